"""A PEFT model with fused layers computes what PEFT's own layers do, and is saved byte for byte alike."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from qlora_cli.kernels.isolation import prepare_packing
from qlora_cli.model.adapter import save_adapter
from qlora_cli.model.base import Base
from qlora_cli.model.fused import Fused, frozen_weight
from qlora_cli.model.owner import Owner
from qlora_cli.tasks.causal_lm import collate
from qlora_cli.tasks.table import target_losses
from tests.model.tiny_adapters import CPU, DTYPES, ROWS, assert_close, by_peft, fused_layers, step
from tests.tiny import write_tiny_model

DATA_TYPES: dict[str, dict[str, Any]] = {
    name: {"data_type": name} for name in ("none", "nf4", "fp4", "nf2", "int4", "int2")
}
DATA_TYPES["mixed"] = {
    "data_type": "nf4",
    "overrides": {"*q_proj": "int2", "*up_proj": "none", "*.1.*down_proj": "nf2"},
}


def exactly(base: Base, model: Any, packed: bool = False) -> list[Tensor]:
    """The step of a base that computes in bf16, in fp32 from the same weights."""
    wide = copy.deepcopy(model).float()
    for module in wide.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    return step(replace(base, model=wide.get_base_model(), compute_dtype=torch.float32), wide, packed)


def assert_as_exact(found: list[Tensor], plain: list[Tensor], truth: list[Tensor]) -> None:
    """Every gradient within twice the plain way's rounding, and all together as near."""
    for ours, theirs, wanted in zip(found[1:], plain[1:], truth[1:], strict=True):
        assert (ours - wanted).norm() <= 2 * (theirs - wanted).norm() <= 0.4 * wanted.norm()
    ours, theirs, wanted = (torch.cat([gradient.flatten() for gradient in some[1:]]) for some in (found, plain, truth))
    assert 0 < (ours - wanted).norm() <= 1.25 * (theirs - wanted).norm()
    assert abs(found[0] - truth[0]) <= 2 * abs(plain[0] - truth[0]) + 1e-3 * truth[0]


def assert_alike(base: Base, model: Any, packed: bool = False) -> None:
    """Fused and by PEFT: in fp32 the same, in bf16 as near to the truth."""
    ours = step(base, model, packed)
    with by_peft(model):
        plain = step(base, model, packed)
    if base.compute_dtype == torch.float32:
        assert_close(ours, plain)
    else:
        assert_as_exact(ours, plain, exactly(base, model, packed))


@pytest.mark.parametrize("compute_dtype", DTYPES)
@pytest.mark.parametrize("data_type", DATA_TYPES)
def test_loss_and_gradients_are_pefts(build, calls, data_type, compute_dtype):
    base, model = build(DATA_TYPES[data_type] | {"compute_dtype": compute_dtype})
    assert len(fused_layers(model)) == 14
    assert_alike(base, model)
    assert len(calls) >= 28


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("compute_dtype", DTYPES)
@pytest.mark.parametrize("data_type", ["none", "nf4", "int4"])
def test_loss_and_gradients_are_pefts_recomputed_and_packed(build, data_type, compute_dtype, packed):
    base, model = build({"data_type": data_type, "compute_dtype": compute_dtype})
    if packed:
        prepare_packing(model, CPU, 259)
    base.model.gradient_checkpointing_enable({"use_reentrant": False})
    base.model.enable_input_require_grads()
    assert_alike(base, model, packed)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("compute_dtype", DTYPES)
def test_recomputation_changes_no_bit_under_dropout(build, calls, compute_dtype, use_reentrant):
    base, model = build({"compute_dtype": compute_dtype}, dropout=0.3)
    plain = step(base, model)
    assert not torch.equal(plain[1], step(base, model, seed=1)[1])
    assert set(calls) == {0.3, 0.0}  # 0 where the base proves what it does to its logits
    base.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    base.model.enable_input_require_grads()
    assert all(map(torch.equal, step(base, model), plain))


@pytest.mark.parametrize("compute_dtype", DTYPES)
@pytest.mark.parametrize("data_type", ["none", "nf4", "int2"])
def test_an_evaluation_between_two_steps_changes_nothing(build, data_type, compute_dtype):
    """Both steps and the losses between are PEFT's, and the second step sees the weights that the first one left."""
    base, model = build({"data_type": data_type, "compute_dtype": compute_dtype}, dropout=0.3)
    start = copy.deepcopy(peft.get_peft_model_state_dict(model))

    def two_steps(evaluates: bool) -> list[list[Tensor]]:
        peft.set_peft_model_state_dict(model, start)
        losses, found = [], []
        for _ in range(2):
            found.append(step(base, model))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data -= 0.1 * parameter.grad
            if evaluates:
                model.eval()
                with base.compute():
                    losses.append(target_losses(base, model, collate(ROWS, CPU))[0])
                model.train()
        return [*found, losses]

    first, second, losses = two_steps(True)
    assert not torch.equal(first[1], second[1])
    for ours, other in zip([first, second], two_steps(False), strict=False):
        assert all(map(torch.equal, ours, other))
    model.eval()
    with by_peft(model), base.compute():
        assert_close(
            losses[1:],
            [target_losses(base, model, collate(ROWS, CPU))[0]],
            1e-5 if compute_dtype == "float32" else 0.03,
        )


@pytest.mark.parametrize("compute_dtype", DTYPES)
@pytest.mark.parametrize("data_type", ["nf4", "fp4"])
def test_shapes_that_bitsandbytes_gets_wrong_are_right(build, tmp_path, data_type, compute_dtype):
    folder = write_tiny_model(tmp_path / "narrow", hidden_size=48, intermediate_size=80)
    base, model = build({"data_type": data_type, "compute_dtype": compute_dtype}, {"name_or_path": str(folder)})
    plain, _ = build({"data_type": "none"}, {"name_or_path": str(folder)})
    assert_alike(base, model)
    names = [name for name, module in model.get_base_model().named_modules() if isinstance(module, Fused)]
    for name in names:
        read = frozen_weight(base.model.get_submodule(name).base_layer).read(torch.float32)
        wanted = plain.model.get_submodule(name).base_layer.weight
        assert (read - wanted).norm() <= 0.15 * wanted.norm()


@pytest.mark.parametrize("kind", ["llama", "head"])
def test_files_and_state_are_byte_for_byte_pefts(build, tmp_path, kind):
    _, model = build(
        {"compute_dtype": "bfloat16"}, target_modules=["q_proj", "lm_head"] if kind == "head" else "all-linear"
    )

    def written(folder: Path) -> tuple[list[str], str, dict[str, bytes]]:
        save_adapter(model, folder / "ours", Owner("some/base"))
        model.save_pretrained(folder / "theirs", save_embedding_layers=False)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        assert len(files) >= 5
        return [*model.state_dict()], repr(model), {str(path.relative_to(folder)): path.read_bytes() for path in files}

    found = written(tmp_path / "fused")
    with by_peft(model):
        assert written(tmp_path / "peft") == found


@pytest.mark.parametrize("compute_dtype", DTYPES)
@pytest.mark.parametrize(
    "adapter",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 4.0}},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_plain_adapters_of_other_shapes_are_fused_and_pefts(build, calls, adapter, compute_dtype):
    base, model = build({"compute_dtype": compute_dtype}, **adapter)
    assert_alike(base, model)
    assert calls
