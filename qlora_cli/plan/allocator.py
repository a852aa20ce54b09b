"""What PyTorch's CUDA allocator reserves for a sequence of storages: they lie in segments, which it never gives back.

Replayed as c10/cuda/CUDACachingAllocator.cpp (torch 2.13) does it by default: sizes in steps of 512 bytes, one pool of
small storages and one of large, the best fitting free block, split where enough is left, joined when it is free again.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

STEP, SMALL, SMALL_SEGMENT = 512, 1 << 20, 2 << 20
LARGE_SEGMENT, LARGE_SIZE, LARGE_STEP = 20 << 20, 10 << 20, 2 << 20

Block = tuple[int, int, int]
"""Size, segment and offset of free memory; in this order the best fitting one comes first."""


class CachingAllocator:
    """num_bytes: reserved so far."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._free: dict[bool, list[Block]] = {True: [], False: []}
        self._taken: dict[int, tuple[Block, bool]] = {}
        self._begins: dict[tuple[int, int], Block] = {}
        self._ends: dict[tuple[int, int], Block] = {}
        self._segments = 0

    def take(self, number: int, num_bytes: int) -> None:
        """Finds a place for the storage of that number."""
        if num_bytes == 0:
            return
        size = max(STEP, -(-num_bytes // STEP) * STEP)
        small = size <= SMALL
        free = self._free[small]
        at = bisect_left(free, (size, -1, -1))
        block = free[at] if at < len(free) else self._segment(size, small)
        self._remove(block, small)
        whole, segment, offset = block
        left = whole - size
        if left >= STEP if small else left > SMALL:
            self._add((left, segment, offset + size), small)
            block = (size, segment, offset)
        self._taken[number] = block, small

    def give_back(self, number: int) -> None:
        """Frees a storage's place and joins it with free neighbours."""
        if number not in self._taken:
            return
        (size, segment, offset), small = self._taken.pop(number)
        before, behind = self._ends.get((segment, offset)), self._begins.get((segment, offset + size))
        if before is not None:
            self._remove(before, small)
            size, offset = size + before[0], before[2]
        if behind is not None:
            self._remove(behind, small)
            size += behind[0]
        self._add((size, segment, offset), small)

    def _segment(self, size: int, small: bool) -> Block:
        whole = SMALL_SEGMENT if small else LARGE_SEGMENT if size < LARGE_SIZE else -(-size // LARGE_STEP) * LARGE_STEP
        self._segments += 1
        self.num_bytes += whole
        block = (whole, self._segments, 0)
        self._add(block, small)
        return block

    def _add(self, block: Block, small: bool) -> None:
        size, segment, offset = block
        insort(self._free[small], block)
        self._begins[segment, offset] = self._ends[segment, offset + size] = block

    def _remove(self, block: Block, small: bool) -> None:
        size, segment, offset = block
        free = self._free[small]
        del free[bisect_left(free, block)]
        del self._begins[segment, offset], self._ends[segment, offset + size]


def reserved(there: Iterable[int], events: Iterable[tuple[int, int]], rounds: int = 2) -> int:
    """Bytes reserved after some rounds of events (number, bytes taken or, negative, given back).

    there: bytes of each storage that is there before.
    """
    allocator = CachingAllocator()
    for index, num_bytes in enumerate(there):
        allocator.take(-1 - index, num_bytes)
    events = list(events)
    for _ in range(rounds):
        left: set[int] = set()
        for number, num_bytes in events:
            if num_bytes < 0:
                allocator.give_back(number)
                left.discard(number)
            else:
                allocator.take(number, num_bytes)
                left.add(number)
        for number in left:  # gradients, which the optimizer's step lets go
            allocator.give_back(number)
    return allocator.num_bytes
