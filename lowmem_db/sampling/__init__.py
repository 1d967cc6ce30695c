"""Images from a loaded model, grids of them, and the paper's prompts."""
