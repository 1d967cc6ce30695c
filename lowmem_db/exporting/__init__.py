"""Exporting a trained model for other tools: a diffusers folder, a single file, a LoRA. Knows nothing of training."""
