"""A run from start to finish: checks, plan, preparation, training, the final model."""
