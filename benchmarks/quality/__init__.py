"""How well what is trained here is learned: ablations, and the ground under the figures."""
