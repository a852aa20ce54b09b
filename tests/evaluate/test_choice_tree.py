"""Trees hold every choice once, and their masks show each token its own beginning and nothing else."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.evaluate.choice_tokens import Encoded
from qlora_cli.evaluate.choice_tree import Tree, batches_of, tree_mask, trees_of

CHOICE = st.tuples(st.lists(st.integers(0, 2), min_size=2, max_size=9), st.integers(1, 8))
ROWS = st.lists(st.lists(CHOICE, min_size=1, max_size=4), min_size=1, max_size=6)


def encode(row: list[tuple[list[int], int]]) -> list[Encoded]:
    return [Encoded(np.asarray(ids, dtype=np.int32), min(number, len(ids) - 1), 0) for ids, number in row]


def read_off(tree: Tree) -> dict[tuple[int, int], tuple[list[int], list[int]]]:
    """Of each choice: the tokens that its last node sees, and its targets; by the mask and the positions alone."""
    seen = tree_mask(torch.from_numpy(tree.ends)[None], torch.float32)[0, 0] == 0
    found = {}
    for row, choice, nodes, targets in tree.members:
        at = seen[nodes[-1]].nonzero().squeeze(1).numpy()
        assert tree.positions[at].tolist() == list(range(len(at)))
        assert at[-len(nodes) :].tolist() == nodes.tolist()
        found[row, choice] = (tree.tokens[at].tolist(), targets.tolist())
    return found


@settings(max_examples=200, deadline=None)
@given(rows=ROWS, longest=st.sampled_from([0, 4, 100]), boundaries=st.sampled_from([(), (3,), (2, 5)]))
def test_every_choice_is_in_one_tree_and_sees_itself_alone(rows, longest, boundaries) -> None:
    encoded = [encode(row) for row in rows]
    trees = trees_of(encoded, boundaries, longest)
    found = [item for tree in trees for item in read_off(tree).items()]
    assert len(found) == len(dict(found)) == sum(map(len, rows))
    for (row, choice), (tokens, targets) in found:
        each = encoded[row][choice]
        assert tokens == each.read.tolist()
        assert targets == each.ids[-each.num_tokens :].tolist()
    for tree in trees:
        deepest = int(tree.positions.max()) + 1
        assert not tree.has_branches or deepest <= longest
        classes = {sum(len(tokens) > bound for bound in boundaries) for tokens, _ in read_off(tree).values()}
        assert len(classes) == 1


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, budget=st.integers(1, 60))
def test_batches_hold_every_tree_and_keep_to_the_budget(rows, budget) -> None:
    trees = trees_of([encode(row) for row in rows], (), 100)
    batches = list(batches_of(trees, (), budget))
    assert sorted(id(tree) for batch in batches for tree in batch) == sorted(map(id, trees))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(tree.tokens) for tree in batch) <= budget
        assert len({tree.has_branches for tree in batch}) == 1
        lengths = [len(tree.tokens) for tree in batch]
        assert lengths == sorted(lengths, reverse=True)


def test_choices_behind_one_context_hold_it_once() -> None:
    context = list(range(50))
    row = encode([([*context, 60, 61, 62], 3), ([*context, 70, 71], 2), ([*context, 80], 1)])
    (tree,) = trees_of([row], (), 100)
    assert len(tree.tokens) == 50 + 2 + 1
    assert tree.has_branches


def test_padding_is_seen_by_itself_alone() -> None:
    mask = tree_mask(torch.tensor([[3, 3, 3], [2, 2, 0]]), torch.float32)[:, 0] == 0
    assert mask[0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert mask[1].tolist() == [[True, False, False], [True, True, False], [False, False, True]]
