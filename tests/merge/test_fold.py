"""Some rows after the other are what the whole tensor is, whatever its shape."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.errors import Exit, UserError
from qlora_cli.merge import fold
from qlora_cli.merge.adapter_delta import LORA_A, LORA_B, MAGNITUDE, PREFIX, LowRank, Replacement, Rows
from qlora_cli.merge.fold import Fold, folded


def adapter_of(**tensors: torch.Tensor) -> Any:
    return SimpleNamespace(folder="adapter", tensor=lambda name: tensors[name].float())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 40),
    rank=st.integers(1, 5),
    portion=st.integers(1, 200),
    magnitude=st.booleans(),
    transposed=st.booleans(),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16, torch.float16])] * 2),
)
def test_a_low_rank_update_by_rows_is_that_of_the_whole(rows, columns, rank, portion, magnitude, transposed, dtypes):
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    w, a, b, m = (
        torch.randn(*shape, generator=generator) for shape in ((rows, columns), (rank, columns), (rows, rank), (rows,))
    )
    stored = w.T.contiguous() if transposed else w
    stored = stored.to(dtypes[0])
    key = f"{PREFIX}x"
    adapter = adapter_of(**{key + LORA_A: a, key + LORA_B: b, key + MAGNITUDE: m})
    whole = (stored.T if transposed else stored).float() + 1.5 * (b @ a)
    if magnitude:
        whole = whole * (m / whole.norm(dim=1)).unsqueeze(1)
    whole = whole.T if transposed else whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fold, "PORTION", portion)
        pieces = list(folded(adapter, Fold("x.weight", LowRank("x", 1.5, magnitude, transposed)), stored, dtypes[1]))
    found = torch.cat(pieces)
    assert (found.dtype, found.shape) == (dtypes[1], stored.shape)
    tolerance = 1e-5 if dtypes[1] == torch.float32 else torch.finfo(dtypes[1]).eps
    torch.testing.assert_close(found.float(), whole, rtol=tolerance, atol=2 * tolerance)
    assert len(pieces) == 1 or max(piece.numel() for piece in pieces) <= max(8 * portion, 8 * columns)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 50), more=st.integers(0, 9), portion=st.integers(1, 60), data=st.data())
def test_trained_rows_replace_those_of_the_weight_and_come_behind_it(rows, more, portion, data):
    spare = data.draw(st.sets(st.integers(0, rows - 1), max_size=5))
    ids = tuple(sorted(spare | set(range(rows, rows + more)))) or (0,)
    number = max(rows + more, ids[-1] + 1)
    weight, values = torch.randn(rows, 3), torch.randn(len(ids), 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fold, "PORTION", portion)
        found = torch.cat(
            list(folded(adapter_of(t=values), Fold("x", Rows("t", ids, number), 2.0), weight, torch.float32))
        )
    wanted = torch.cat([weight, torch.zeros(number - rows, 3)])
    wanted[list(ids)] = values
    assert torch.equal(found, 2 * wanted)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4), (0, 5)])
def test_any_shape_is_cast_and_scaled(shape):
    weight = torch.randn(shape).bfloat16()
    found = [*folded(adapter_of(), Fold("x", None, 0.5), weight, torch.float32)]
    assert all(piece.shape[1:] == weight.shape[1:] for piece in found)
    whole = found[0] if len(found) == 1 else torch.zeros(shape)
    assert torch.equal(whole, weight.float() * 0.5)


def test_what_needs_nothing_is_the_very_tensor():
    weight = torch.randn(5, 5)
    (found,) = folded(adapter_of(), Fold("x", None), weight, torch.float32)
    assert found is weight
    (found,) = folded(adapter_of(t=weight), Fold("x", Replacement("t")), torch.zeros(5, 5), torch.float32)
    assert torch.equal(found, weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e6])
def test_a_value_that_the_dtype_does_not_hold_names_the_weight(value):
    weight = torch.zeros(300, 2)
    weight[299, 1] = value
    with pytest.raises(UserError, match=r"the merged x\.weight is not finite in torch\.float16") as caught:
        list(folded(adapter_of(), Fold("x.weight", None), weight, torch.float16))
    assert caught.value.code == Exit.FAILED
