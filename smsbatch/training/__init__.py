"""Distillation: the training of a generator."""
