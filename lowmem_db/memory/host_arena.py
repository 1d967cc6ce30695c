"""Host memory that is allocated once and reused."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowmem_db.host_memory import empty_on_host

CHUNK_BYTES = 64 * 2**20  # a power of two, because torch rounds pinned allocations up to one
_ALIGNMENT = 512


class Region(NamedTuple):
    """Bytes of an arena: ``tensor`` begins at byte ``start`` of the chunk with that number."""

    chunk: int
    start: int
    tensor: Tensor


class HostArena:
    """Hands out host memory, and reuses what is given back.

    Args:
        device: The device that the memory is copied to and from.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._chunks: list[Tensor] = []
        self._free: list[list[tuple[int, int]]] = []  # of each chunk: sorted (start, end), never adjacent

    def take(self, num_bytes: int) -> Region:
        """Return ``num_bytes`` bytes, as uint8, from the first gap large enough."""
        needed = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        for chunk, gaps in enumerate(self._free):
            for index, (start, end) in enumerate(gaps):
                if end - start >= needed:
                    gaps[index : index + 1] = [(start + needed, end)] if end - start > needed else []
                    return self._region(chunk, start, num_bytes)
        self._add_chunk(max(needed, CHUNK_BYTES))
        return self.take(num_bytes)

    def give_back(self, region: Region) -> None:
        """Take bytes back."""
        size = -(-region.tensor.numel() // _ALIGNMENT) * _ALIGNMENT
        gaps = sorted([*self._free[region.chunk], (region.start, region.start + size)])
        self._free[region.chunk] = _merged(gaps)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated on the host."""
        return sum(chunk.numel() for chunk in self._chunks)

    @property
    def num_bytes_free(self) -> int:
        """Allocated bytes that are not handed out."""
        return sum(end - start for gaps in self._free for start, end in gaps)

    def _add_chunk(self, num_bytes: int) -> None:
        self._chunks.append(empty_on_host((num_bytes,), torch.uint8, device=self._device))
        self._free.append([(0, num_bytes)])

    def _region(self, chunk: int, start: int, num_bytes: int) -> Region:
        return Region(chunk, start, self._chunks[chunk][start : start + num_bytes])


def _merged(gaps: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    merged = [gaps[0]]
    for start, end in gaps[1:]:
        if start == merged[-1][1]:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged
