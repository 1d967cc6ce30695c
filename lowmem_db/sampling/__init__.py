"""From noise to latents, pictures in grids, and the prompts of the paper."""
