"""Pixels are handed through; latents are tested with the autoencoders of test_stable_diffusion."""

import torch

from lowmem_db.models.families.spaces import PixelSpace


def test_pixels_are_handed_through_without_deviation() -> None:
    codec, pixels = PixelSpace().load(), torch.rand(2, 3, 8, 8) * 2 - 1
    codec.decode_in_tiles(8)
    mean, std = codec.encode(pixels)
    assert torch.equal(mean, pixels)
    assert not std.any()
    assert torch.equal(codec.decode(mean * 3), (pixels * 3).clamp(-1, 1))
    assert (PixelSpace().cell, PixelSpace().channels) == (1, 3)
