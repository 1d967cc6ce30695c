"""The loop around the training step, its observers and its checkpoints. Nothing here depends on the model family."""
