"""A run from its first to its last line: checks, plan, preparation, training, the final model."""
