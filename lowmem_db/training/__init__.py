"""The loop around the training step, what watches it, and what a run is continued from. No model family is known here."""
