"""Models: the table of families, loading component by component, prompts to conditioning, what trains."""
