"""A projection of EfficientNet-Lite0's features in which views of one subject are alike and other subjects are not.

It was fitted on drawings by linear discriminant analysis; ``accuracy.json`` next to its weights says how well it tells
subjects of one class apart.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "identity_projection"
WEIGHTS_FILE = "projection.safetensors"
ACCURACY_FILE = "accuracy.json"
NUM_DIRECTIONS = 256


def load_projection(device: torch.device) -> Float[Tensor, "features directions"]:
    """Load the projection in fp32."""
    return load_file(FOLDER / WEIGHTS_FILE, device=str(device))["projection"].float()
