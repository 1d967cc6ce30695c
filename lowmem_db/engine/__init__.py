"""What runs a model: one training step, one drawing loop, and how both are built in a memory strategy."""
