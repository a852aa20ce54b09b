"""The certificate: its limits, when it holds, and what of it is written down."""

from __future__ import annotations

import json
import math

import pytest
import torch

from qlora_cli.errors import Exit, UserError
from qlora_cli.merge.certificate import INT8, LIMITS, ORIGINAL, Certificate, certify, limit_of
from qlora_cli.merge.difference import Difference, Seen
from qlora_cli.merging.record import DTYPES


def of(mean_kl: float, limit: float | None) -> Certificate:
    return Certificate(Difference(0.1, mean_kl, 0.2, 1.0, 7), 2.0, 2.1, limit, 1e-3, 3, "eval", "whole")


def test_every_dtype_that_is_written_has_a_limit_and_the_coarser_decides():
    assert LIMITS.keys() == DTYPES.keys()
    assert LIMITS["float32"] < LIMITS["float16"] < LIMITS["bfloat16"] < INT8 < ORIGINAL
    for coarse, fine in (("bfloat16", "float32"), ("bfloat16", "float16"), ("float16", "float32")):
        assert limit_of(coarse, fine, "dequantized", "nf4") == LIMITS[coarse]
        assert limit_of(fine, coarse, "dequantized", "nf4") == LIMITS[coarse]


@pytest.mark.parametrize("dtype", LIMITS)
def test_other_weights_and_int8_layers_may_cost_more(dtype):
    assert limit_of("float32", dtype, "original", "nf4") == ORIGINAL
    assert limit_of("float32", dtype, "dequantized", "int8") == INT8
    assert limit_of("float32", dtype, "original", "int8") == ORIGINAL


@pytest.mark.parametrize(
    ("mean_kl", "limit", "held"),
    [(1e-3, 1e-3, True), (1.1e-3, 1e-3, False), (0.0, 0.0, True), (9.0, None, None), (math.nan, 1e-3, False)],
)
def test_it_holds_up_to_its_limit_and_without_one(mean_kl, limit, held):
    assert of(mean_kl, limit).held is held
    assert of(mean_kl, limit).to_json()["held"] is held


def test_its_json_is_flat_and_has_every_figure():
    found = of(1e-4, 1e-3).to_json()
    assert json.loads(json.dumps(found)) == found
    assert found == {
        "held": True,
        "max_abs": 0.1,
        "mean_kl": 1e-4,
        "p99_kl": 0.2,
        "top1_agreement": 1.0,
        "positions": 7,
        "loss_unmerged": 2.0,
        "loss_merged": 2.1,
        "limit": 1e-3,
        "default_limit": 1e-3,
        "rows": 3,
        "data": "eval",
        "manner": "whole",
    }


def test_it_compares_what_two_models_say_and_keeps_their_losses():
    one, other = Seen([torch.tensor([[2.0, 0.0]])], 0.5), Seen([torch.tensor([[0.0, 2.0]])], 2.5)
    found = certify(one, other, (0.1, 0.1), (1, "train"), "streamed")
    assert (found.loss_unmerged, found.loss_merged, found.rows, found.data) == (0.5, 2.5, 1, "train")
    assert (found.manner, found.held, found.difference.top1_agreement) == ("streamed", False, 0.0)
    assert certify(one, one, (0.0, 0.1), (1, "eval"), "whole").held


@pytest.mark.parametrize(("broken", "todo"), [("unmerged", "Train again at a lower"), ("merged", "Merge in bfloat16")])
def test_a_model_that_says_no_number_has_no_certificate(broken, todo):
    fine, wrong = Seen([torch.zeros(1, 2)], 1.0), Seen([torch.tensor([[0.0, math.nan]])], math.nan)
    with pytest.raises(UserError, match=f"{broken} model: its logits are not finite in portion 1.*{todo}") as caught:
        certify(*((wrong, fine) if broken == "unmerged" else (fine, wrong)), (None, None), (1, "eval"), "whole")
    assert caught.value.code == Exit.FAILED
