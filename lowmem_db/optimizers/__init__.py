"""Optimizers behind one handle, learning-rate schedules, and the moving average of the weights."""
