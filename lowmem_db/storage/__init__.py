"""What is kept on disk: atomic writes, the tensor store, the run folder, checkpoints. Knows nothing about models."""
