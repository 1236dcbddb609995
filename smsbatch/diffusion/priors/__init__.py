"""Frozen latent diffusion models, behind one interface."""
