"""The loop around the training step, what watches it, and what a run is continued from; no family is known here."""
