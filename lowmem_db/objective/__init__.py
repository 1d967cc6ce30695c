"""DreamBooth's loss (arXiv:2208.12242, Equation 2): timesteps, noise, weights, instance and prior terms."""
