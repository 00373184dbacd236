"""Training: the autoencoder and latent diffusion from nothing, and the fine-tuning of models that exist."""
