"""From noise to latents, grids of pictures, and the prompts of the paper."""
