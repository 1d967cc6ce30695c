"""Models: their families, where their files are, how each component is loaded and saved."""

from lowmem_db.environment import without_downloads

with without_downloads():  # diffusers imports peft, and peft imports bitsandbytes
    from diffusers import AutoencoderKL as _  # noqa: F401
