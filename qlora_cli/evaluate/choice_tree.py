"""Choices that begin alike as one tree of tokens, so that the model reads what they share once.

The nodes of a tree stand in one line, each branch whole before the next one begins. A token at i sees the token at j
where i is in the branch that j begins: j <= i < ends[j]. Its position is its depth. A tree without branches is a plain
row, which needs neither mask nor positions.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlora_cli.evaluate.choice_tokens import Encoded

LONGEST_TREE = 2048
"""Tokens up to which rows with a common beginning become one tree: the mask has the square of it."""

Ints = NDArray[np.int64]


class Member(NamedTuple):
    """A choice in a tree. nodes: (N,) int64, those that predict its tokens; targets: (N,) int64, these tokens."""

    row: int
    choice: int
    nodes: Ints
    targets: Ints


class Tree(NamedTuple):
    """tokens, positions, ends: (T,) int64 as above; has_branches: whether a mask is needed."""

    tokens: Ints
    positions: Ints
    ends: Ints
    members: list[Member]

    @property
    def has_branches(self) -> bool:
        return bool((self.ends != len(self.ends)).any())


class Candidate(NamedTuple):
    """A choice to be scored, and whose it is."""

    row: int
    choice: int
    encoded: Encoded

    @property
    def key(self) -> bytes:
        """What sorts as the tokens do that are read, and takes less room than a list of them."""
        return self.encoded.read.astype(">i4").tobytes()


def grow(candidates: Sequence[Candidate]) -> Tree:
    """The tree of all the candidates. Sorted, each shares with the one before it all that it shares with any."""
    ordered = sorted(candidates, key=lambda candidate: candidate.key)
    tokens: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    path: list[int] = []
    members = []
    before = np.empty(0, dtype=np.int32)
    for row, choice, encoded in ordered:
        shared = num_shared(before, encoded.read)
        for node in path[shared:]:
            ends[node] = len(tokens)
        first, rest = len(tokens), encoded.read[shared:].tolist()
        path = path[:shared] + list(range(first, first + len(rest)))
        tokens += rest
        positions += range(shared, shared + len(rest))
        ends += [0] * len(rest)
        nodes = np.asarray(path[len(path) - encoded.num_tokens :], dtype=np.int64)
        members.append(Member(row, choice, nodes, encoded.ids[-encoded.num_tokens :].astype(np.int64)))
        before = encoded.read
    for node in path:
        ends[node] = len(tokens)
    columns = [np.asarray(column, dtype=np.int64) for column in (tokens, positions, ends)]
    return Tree(columns[0], columns[1], columns[2], members)


def num_shared(left: NDArray[np.int32], right: NDArray[np.int32]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    length = min(len(left), len(right))
    differing = np.flatnonzero(left[:length] != right[:length])
    return int(differing[0]) if len(differing) else length


def trees_of(rows: Sequence[Sequence[Encoded]], boundaries: Sequence[int], longest: int) -> list[Tree]:
    """All choices of all rows in trees.

    boundaries: lengths beyond which a model's positions change (`rope_boundaries`), so that no tree goes over one.
    longest: tokens of a choice up to which it may be in a tree with branches; 0 where the model can read none.
    """
    shared: list[list[Candidate]] = []
    trees = []
    for index, encoded in enumerate(rows):
        classes: dict[int, list[Candidate]] = defaultdict(list)
        for choice, each in enumerate(encoded):
            classes[bisect_left(boundaries, len(each.read))].append(Candidate(index, choice, each))
        for alike in classes.values():
            if max(len(candidate.encoded.read) for candidate in alike) <= longest:
                shared.append(alike)
            else:
                trees += [grow(nested) for nested in _nested(alike)]
    return trees + [grow(alike) for alike in _alike(shared, boundaries)]


def _nested(candidates: Sequence[Candidate]) -> Iterator[list[Candidate]]:
    """Groups of candidates of which each is the beginning of the next: their trees have no branches."""
    ordered = sorted(candidates, key=lambda candidate: candidate.key)
    group = ordered[:1]
    for before, after in pairwise(ordered):
        if num_shared(before.encoded.read, after.encoded.read) < len(before.encoded.read):
            yield group
            group = []
        group.append(after)
    yield group


def _alike(rows: Sequence[list[Candidate]], boundaries: Sequence[int]) -> Iterator[list[Candidate]]:
    """The rows, each joined to others where that saves at least half of it: questions behind the same five shots."""
    ordered = sorted(rows, key=lambda row: row[0].key)
    group: list[Candidate] = []
    size = 0
    for row in ordered:
        first = row[0].encoded.read
        before = group[-1].encoded.read if group else first[:0]
        shared = num_shared(before, first)
        length = sum(len(each.encoded.read) for each in row) - (len(row) - 1) * _common(row)
        same = bisect_left(boundaries, len(before)) == bisect_left(boundaries, len(first))
        if group and not (same and shared >= length / 2 and size + length - shared <= LONGEST_TREE):
            yield group
            group, size, shared = [], 0, 0
        group += row
        size += length - shared
    if group:
        yield group


def _common(row: Sequence[Candidate]) -> int:
    """Tokens that all choices of a row begin with."""
    return min(num_shared(row[0].encoded.read, each.encoded.read) for each in row)


def batches_of(trees: Sequence[Tree], boundaries: Sequence[int], token_budget: int) -> Iterator[list[Tree]]:
    """The trees in batches of at most `token_budget` tokens with padding, or of one; of each kind the longest first."""

    def kind(tree: Tree) -> tuple[int, bool]:
        return bisect_left(boundaries, int(tree.positions.max()) + 1), tree.has_branches

    batch: list[Tree] = []
    for tree in sorted(trees, key=lambda tree: (kind(tree), len(tree.tokens)), reverse=True):
        if batch and ((len(batch) + 1) * len(batch[0].tokens) > token_budget or kind(tree) != kind(batch[0])):
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch


def tree_mask(ends: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, T, T) in `dtype`: 0 where a token sees another, else the lowest number.

    ends: (B, T) int64; of padding, any number up to its own place leaves it to itself and to nobody else.
    """
    at = torch.arange(ends.shape[1], device=ends.device)
    seen = (at <= at[:, None]) & (at[:, None] < ends[:, None, :])
    seen |= at == at[:, None]  # padding too: a softmax over nothing is no number
    return torch.zeros(seen.shape, dtype=dtype, device=ends.device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
