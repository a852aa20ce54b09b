"""Training steps with fused norms and MLPs are those of the model's own code, in every way that a step can go."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_cli.kernels.isolation import prepare_packing
from qlora_cli.model.base import fingerprint, load_base
from qlora_cli.model.layer_kernels import in_words
from tests.model.fused_modules import models_own
from tests.model.tiny_adapters import CPU, DTYPES, assert_close, step


def test_trained_norms_of_an_adapter_get_their_gradients(build):
    base, model = build(modules_to_save=["input_layernorm"])
    ours = step(base, model)
    with models_own(model):
        theirs = step(base, model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sum("input_layernorm" in name for name in trained) == 2
    assert_close(ours, theirs)


def assert_alike(base: Any, model: Any, packed: bool = False) -> None:
    """Fused and by the model's own code: in fp32 the same, in bf16 the loss and all gradients within rounding."""
    ours = step(base, model, packed)
    with models_own(model):
        theirs = step(base, model, packed)
    if base.compute_dtype == torch.float32:
        assert_close(ours, theirs)
        return
    found, wanted = (torch.cat([gradient.flatten() for gradient in some[1:]]).double() for some in (ours, theirs))
    assert (found - wanted).norm() <= 0.02 * wanted.norm()
    assert torch.equal(ours[0], theirs[0]), "forward keeps its bits"


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("compute_dtype", DTYPES)
@pytest.mark.parametrize("data_type", ["none", "nf4", "int2"])
def test_a_step_of_an_adapter_is_the_models_own(build, data_type, compute_dtype, packed, recomputed):
    """Micro-batches accumulated, packed or padded, recomputed or not, under dropout."""
    base, model = build({"data_type": data_type, "compute_dtype": compute_dtype}, dropout=0.3)
    assert in_words(base.model) == "5 norms and 2 MLPs fused (torch functions)"
    if packed:
        prepare_packing(model, CPU, 259)
    if recomputed:
        base.model.gradient_checkpointing_enable({"use_reentrant": False})
        base.model.enable_input_require_grads()
    assert_alike(base, model, packed)


@pytest.mark.parametrize("compute_dtype", DTYPES)
def test_recomputation_and_an_evaluation_between_steps_change_no_bit(build, compute_dtype):
    base, model = build({"compute_dtype": compute_dtype}, dropout=0.3)
    plain = step(base, model)
    model.eval()
    with torch.no_grad(), base.compute():
        model(input_ids=torch.arange(12).view(1, 12))
    model.train()
    assert all(map(torch.equal, step(base, model), plain))
    base.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(map(torch.equal, step(base, model), plain))


def test_fingerprint_and_summary_are_those_of_the_models_own_code(make_recipe):
    own, ours = (load_base(make_recipe(training={"layer_kernels": wanted}), CPU) for wanted in ("torch", "auto"))
    assert [in_words(base.model) != "" for base in (own, ours)] == [False, True]
    assert fingerprint(own.model) == fingerprint(ours.model)
    assert own.summary == ours.summary
