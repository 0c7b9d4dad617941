"""Open-Sora 1.2 as a diffusers pipeline: its transformer, its two-stage video autoencoder, and its published checkpoints."""
