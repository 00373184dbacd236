"""Model files: what they call things (`names`), what they hold (`layouts`, `sources`), networks from them (`load`).

Networks need torch; reading headers does not, so that what does not need it never imports it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.checkpoint.load import Model, load_model, load_text, load_unet, load_vae

__all__ = ["Model", "load_model", "load_text", "load_unet", "load_vae"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from ldm.checkpoint import load

        return getattr(load, name)
    raise AttributeError(f"module 'ldm.checkpoint' has no attribute {name!r}")
