"""Rows of unequal length as one tensor: torch's own padding, and the mask that belongs to it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

from qlora_cli.tasks.padding import mask_of, padded


@given(rows=st.lists(st.lists(st.integers(-100, 2**40)), min_size=1, max_size=6), value=st.integers(-100, 9))
def test_rows_are_padded_on_the_right_as_torch_does(rows: list[list[int]], value: int):
    wanted = pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], True, value)
    assert padded(rows, value).equal(wanted)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in rows], True, 0)
    assert mask_of([*map(len, rows)]).equal(mask)
    assert padded(rows, value).dtype == mask.dtype == torch.int64
