"""One training step, the loop around it, and what a run is continued from. No model family, no memory technique."""
