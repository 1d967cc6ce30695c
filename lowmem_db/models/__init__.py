"""Models: their families, where their files are, how each component is loaded and saved."""
