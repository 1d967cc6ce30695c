"""Random numbers as a pure function of the position in a run, so that a resume needs only the step number.

``generator(seed, stream, step, item)`` gives the same numbers whatever was drawn before, on any device and in any
batch. Generators live on the CPU and draws are moved to the device, because CUDA draws other numbers from a seed.
"""

import hashlib

import torch


def derive_seed(seed: int, stream: str, *indices: int) -> int:
    """Mix a run's seed, the name of a stream and its indices into one 63-bit seed.

    Args:
        seed: The run's seed.
        stream: What the numbers are for, such as ``"timesteps"``; streams are independent of each other.
        indices: Position in the stream, such as the step and the sample.
    """
    text = ":".join([str(seed), stream, *map(str, indices)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, stream: str, *indices: int) -> torch.Generator:
    """Return a CPU generator for one position in one stream; see :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, stream, *indices))


def permutation(seed: int, stream: str, epoch: int, length: int) -> list[int]:
    """Return the order of ``length`` items in one epoch."""
    return torch.randperm(length, generator=generator(seed, stream, epoch)).tolist()
