"""liger-kernel's functions are their plain references, run by Triton's interpreter in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.kernels import liger
from qlora_cli.kernels.rms_norm import ORDERS, reference_rms_norm
from qlora_cli.kernels.swiglu import ACTIVATIONS

MISSING = [name for name in ("triton", "liger_kernel") if find_spec(name) is None]


@pytest.fixture(scope="module")
def errors() -> dict[str, Any]:
    if MISSING:
        pytest.skip(f"{' and '.join(MISSING)} not installed (extra test, Linux)")
    command = [sys.executable, "-m", "tests.kernels.liger_worker"]
    root = Path(__file__).resolve().parent.parent.parent
    done = subprocess.run(
        command, cwd=root, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_values_and_gradients_are_the_references_in_fp32(errors):
    assert errors["norms"].keys() == ORDERS.keys()
    assert errors["gated"].keys() == ACTIVATIONS.keys()
    assert all(error <= 1e-6 for error in [*errors["norms"].values(), *errors["gated"].values(), errors["rotary"]])


def test_each_order_of_casts_is_the_nearest_to_its_own_reference(errors):
    """Shares of the values in fp16 that are others than the reference's."""
    for order, shares in errors["casts"].items():
        assert min(shares, key=lambda name: shares[name]) == order
        assert all(share > 2 * shares[order] for name, share in shares.items() if name != order)


def test_a_norm_whose_weight_has_another_type_is_computed_by_torch():
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(8)
    assert torch.equal(liger.rms_norm(x, weight, 1e-5), reference_rms_norm(x, weight, 1e-5))
