"""Full DreamBooth fine-tuning of diffusion models inside the memory of a gaming GPU (arXiv:2208.12242)."""

__version__ = "0.1.0"
