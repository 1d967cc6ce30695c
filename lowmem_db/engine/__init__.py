"""Running a model: one training step, one drawing loop, and building both for a memory strategy."""
