"""A model of torch's caching allocator: what it reserves of a card for a sequence of allocations.

It follows ``c10/cuda/CUDACachingAllocator.cpp``. Small and large blocks have pools of their own. An allocation takes
the smallest free block that holds it and gives the rest back where that is worth it; where there is none, a segment is
reserved. With expandable segments a pool is one segment that grows at its end. Freed neighbours become one block.
"""

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import count

_MIB = 1 << 20
_ROUNDING = 512
_LARGEST_SMALL = 1 * _MIB
_SMALL_SEGMENT, _LARGE_SEGMENT = 2 * _MIB, 20 * _MIB
_OWN_SEGMENT = 10 * _MIB  # from here on a block gets a segment of its size
_OWN_SEGMENT_ROUNDING = 2 * _MIB

Event = tuple[Hashable, int]
"""A name and the bytes that are allocated under it, or 0 where they are freed."""


@dataclass(eq=False)
class _Block:
    num_bytes: int
    pool: "_Pool"
    is_free: bool = False
    before: "_Block | None" = None
    after: "_Block | None" = None


@dataclass(eq=False)
class _Pool:
    is_small: bool
    free: list[tuple[int, int, _Block]] = field(default_factory=list)
    last: _Block | None = None  # of the segment that grows

    @property
    def segment_bytes(self) -> int:
        return _SMALL_SEGMENT if self.is_small else _LARGE_SEGMENT


class CachingAllocator:
    """Blocks and segments of one card.

    Args:
        expandable: Segments grow (``expandable_segments:True``).

    Attributes:
        reserved_bytes: What is taken from the driver now.
        peak_reserved_bytes: Most that was.
    """

    def __init__(self, *, expandable: bool) -> None:
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self._expandable = expandable
        self._small, self._large = _Pool(is_small=True), _Pool(is_small=False)
        self._order = count()
        self._used: dict[Hashable, _Block] = {}

    def run(self, events: Iterable[Event]) -> None:
        """Allocate and free."""
        for name, num_bytes in events:
            if num_bytes:
                self.allocate(name, num_bytes)
            else:
                self.free(name)

    def allocate(self, name: Hashable, num_bytes: int) -> None:
        """Allocate bytes under a name that is not in use."""
        size = -(-num_bytes // _ROUNDING) * _ROUNDING
        pool = self._small if size <= _LARGEST_SMALL else self._large
        block = self._best_fit(pool, size) or self._reserve(pool, size)
        block.is_free = False
        self._split(block, size)
        self._used[name] = block

    def free(self, name: Hashable) -> None:
        """Free what was allocated under a name."""
        block = self._used.pop(name)
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.is_free:
                self._take(neighbour)
                block = self._joined(block, neighbour)
        self._give(block)

    def _best_fit(self, pool: _Pool, size: int) -> _Block | None:
        index = bisect_left(pool.free, (size, -1))
        return pool.free.pop(index)[2] if index < len(pool.free) else None

    def _reserve(self, pool: _Pool, size: int) -> _Block:
        if self._expandable:
            return self._grow(pool, size)
        whole = -(-size // _OWN_SEGMENT_ROUNDING) * _OWN_SEGMENT_ROUNDING
        num_bytes = pool.segment_bytes if size < _OWN_SEGMENT else whole
        self._count(num_bytes)
        return _Block(num_bytes, pool)

    def _grow(self, pool: _Pool, size: int) -> _Block:
        """Grow a pool's segment by whole pages; what is free at its end is part of the new block."""
        last = pool.last
        at_end = last if last is not None and last.is_free else None
        missing = size - (at_end.num_bytes if at_end else 0)
        num_bytes = -(-missing // pool.segment_bytes) * pool.segment_bytes
        self._count(num_bytes)
        if at_end is not None:
            self._take(at_end)
            at_end.num_bytes += num_bytes
            return at_end
        block = _Block(num_bytes, pool, before=last)
        if last is not None:
            last.after = block
        pool.last = block
        return block

    def _count(self, num_bytes: int) -> None:
        self.reserved_bytes += num_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _split(self, block: _Block, size: int) -> None:
        """Give back what a block has beyond a size, where that is worth it."""
        rest = block.num_bytes - size
        worth_it = rest >= _ROUNDING if block.pool.is_small or self._expandable else rest > _LARGEST_SMALL
        if not worth_it:
            return
        behind = _Block(rest, block.pool, before=block, after=block.after)
        if block.after is not None:
            block.after.before = behind
        block.num_bytes, block.after = size, behind
        if block.pool.last is block:
            block.pool.last = behind
        self._give(behind)

    def _give(self, block: _Block) -> None:
        block.is_free = True
        insort(block.pool.free, (block.num_bytes, next(self._order), block))

    def _take(self, block: _Block) -> None:
        free = block.pool.free
        index = bisect_left(free, (block.num_bytes, -1))
        while free[index][2] is not block:
            index += 1
        free.pop(index)

    def _joined(self, block: _Block, neighbour: _Block) -> _Block:
        """Return two neighbours as one block."""
        first, second = (neighbour, block) if block.before is neighbour else (block, neighbour)
        first.num_bytes += second.num_bytes
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        if first.pool.last is second:
            first.pool.last = first
        return first


def reserved_bytes(events: Iterable[Event], *, expandable: bool) -> int:
    """Return the most bytes that are reserved at once for a sequence of allocations.

    Args:
        events: Allocations and where they are freed.
        expandable: Segments grow.
    """
    allocator = CachingAllocator(expandable=expandable)
    allocator.run(events)
    return allocator.peak_reserved_bytes
