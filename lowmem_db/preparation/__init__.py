"""Everything before training that writes to disk: class images, latent moments, text embeddings.

Each phase loads one component, uses it and frees it. Existing results are reused.
"""
