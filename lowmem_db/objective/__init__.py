"""The loss of DreamBooth (arXiv:2208.12242, Equation 2): timesteps, noising, weights, instance and prior terms."""
