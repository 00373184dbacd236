"""Model files: what they call things (`names`), what they hold (`detect`, `layouts`), networks from them (`load`)."""

from ldm.checkpoint.load import Model, load_model, load_text, load_unet, load_vae

__all__ = ["Model", "load_model", "load_text", "load_unet", "load_vae"]
