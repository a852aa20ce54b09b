"""GPTQ and AWQ layers multiply with what is stored, give gradients after any evaluation, and keep nothing for them."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.errors import Exit, UserError
from qlora_cli.model.adapter import attach_adapter
from qlora_cli.model.base import fingerprint
from qlora_cli.quant.gptq import choose_kernel
from qlora_cli.quant.layers import quantized_modules, stored_tensors
from tests.stored_bases import AWQ, GPTQ, TOKENS, distance, loaded, needs_package, trained, write_stored

STORED = [
    ("gptq", GPTQ | {"sym": True, "desc_act": False}),
    ("gptq", GPTQ | {"group_size": 64, "desc_act": False}),
    ("gptq", GPTQ),
    ("gptq", GPTQ | {"group_size": -1}),
    ("gptq", GPTQ | {"bits": 8}),
    ("gptq", GPTQ | {"bits": 2, "group_size": 64, "desc_act": False}),
    ("awq", AWQ),
    ("awq", AWQ | {"group_size": 64}),
]


def test_a_package_that_does_not_import_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "logbar", None)  # Python's own way to let an import fail
    with pytest.raises(UserError, match=r"gptqmodel: cannot be imported: .*logbar.*pip install") as error:
        choose_kernel(SimpleNamespace(quantization_config={"quant_method": "gptq"}))
    assert error.value.code == Exit.ENVIRONMENT


@needs_package
@pytest.mark.parametrize(("method", "stored"), STORED)
def test_hand_packed_weights_give_the_logits_and_gradients_of_what_they_stand_for(
    method, stored, make_recipe, tmp_path
):
    folder, reference = write_stored(tmp_path, method, stored, attention_bias=True)
    base, wanted = loaded(make_recipe, folder), loaded(make_recipe, reference, data_type="none")
    values = load_file(reference / "model.safetensors")
    layers = quantized_modules(base.model)
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(layer.dequantized(torch.float32), values[f"{name}.weight"]), name
    (model, found), (expected, grads) = trained(make_recipe, base), trained(make_recipe, wanted)
    assert len(grads) == 28
    assert found.keys() == grads.keys()
    assert max(distance(found[name], grads[name]) for name in grads) < 1e-4
    with torch.no_grad():
        assert distance(model.eval()(TOKENS).logits, expected.eval()(TOKENS).logits) < 1e-5


@needs_package
@pytest.mark.parametrize(("method", "stored"), [("gptq", GPTQ), ("awq", AWQ)])
def test_bfloat16_multiplies_with_the_stored_scales(method, stored, make_recipe, tmp_path):
    folder, reference = write_stored(tmp_path, method, stored)
    base = loaded(make_recipe, folder, compute_dtype="bfloat16")
    wanted = loaded(make_recipe, reference, data_type="none", compute_dtype="bfloat16")
    with torch.no_grad():
        assert distance(base.model(TOKENS).logits.float(), wanted.model(TOKENS).logits.float()) < 1e-3
    scales = next(layer.scales for layer in quantized_modules(base.model).values())
    assert scales.dtype == torch.float16


@needs_package
def test_no_dequantised_weight_is_kept_for_backward(make_recipe, tmp_path):
    folder, _ = write_stored(tmp_path, "gptq", GPTQ)
    model, _ = trained(make_recipe, loaded(make_recipe, folder))
    shapes = {shape for layer in quantized_modules(model).values() for shape in (layer.in_features, layer.out_features)}
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        model(TOKENS)
    assert kept
    assert not [shape for shape in kept if len(shape) == 2 and set(shape) <= shapes]


@needs_package
@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_the_fingerprint_sees_every_stored_tensor(part, make_recipe, tmp_path):
    folder, _ = write_stored(tmp_path, "gptq", GPTQ)
    before = fingerprint(loaded(make_recipe, folder).model)
    assert fingerprint(loaded(make_recipe, folder).model) == before
    tensors = load_file(folder / "model.safetensors")
    changed = tensors[f"model.layers.1.mlp.down_proj.{part}"]
    changed.view(torch.uint8)[0, 0 if changed.dim() > 1 else ...] ^= 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert fingerprint(loaded(make_recipe, folder).model) != before


@needs_package
def test_memory_is_told_by_what_is_stored(make_recipe, tmp_path):
    folder, _ = write_stored(tmp_path, "gptq", GPTQ)
    base = loaded(make_recipe, folder)
    sizes = {"gptq": 0, "scales": 0}
    for kind, tensor in stored_tensors(base.model):
        sizes[kind] = sizes.get(kind, 0) + tensor.numel() * tensor.element_size()
    weights = sum(layer.in_features * layer.out_features for layer in quantized_modules(base.model).values())
    assert sizes["gptq"] == weights / 2
    assert "kB gptq" in base.summary


@needs_package
def test_dora_on_such_a_base_is_refused(make_recipe, tmp_path):
    folder, _ = write_stored(tmp_path, "gptq", GPTQ)
    with pytest.raises(UserError, match=r"adapter\.use_dora") as error:
        attach_adapter(loaded(make_recipe, folder), make_recipe(adapter={"use_dora": True}).adapter)
    assert error.value.code == Exit.REFUSED


@needs_package
@pytest.mark.parametrize(
    ("adapter", "modules"),
    [
        ({}, 14),
        ({"layers": [1]}, 7),
        ({"target_modules": ["q_proj", "v_proj"]}, 4),
        ({"target_modules": r".*\.0\.mlp\..*"}, 3),
        ({"target_modules": ["lm_head"]}, 1),
    ],
)
def test_targets_reach_the_packages_layers(adapter, modules, make_recipe, tmp_path):
    folder, _ = write_stored(tmp_path, "awq", AWQ)
    model = attach_adapter(loaded(make_recipe, folder), make_recipe(adapter=adapter).adapter)
    assert sum(hasattr(module, "lora_A") for module in model.modules()) == modules


@needs_package
def test_a_form_that_the_package_has_no_trainable_kernel_for_is_refused(make_recipe, tmp_path):
    folder, _ = write_stored(tmp_path, "awq", AWQ | {"version": "gemv"})
    with pytest.raises(UserError, match="transformers cannot load this model"):
        loaded(make_recipe, folder)
