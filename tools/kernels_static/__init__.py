"""What the compiler makes of the kernels, held to bars; see :mod:`tools.kernels_static.check`."""
