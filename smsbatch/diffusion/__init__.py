"""Score distillation: objectives, score models, noise schedules and the optimization of latents."""
