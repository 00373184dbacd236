"""The three networks of latent diffusion: `unet`, `vae`, `text`. Pure computation; nothing here reads model files."""
