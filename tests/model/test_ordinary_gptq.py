"""GPTQ and AWQ checkpoints read as ordinary weights, in plain torch: the values that the package's layers have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_cli.errors import UserError
from qlora_cli.model.ordinary import ordinary
from qlora_cli.model.ordinary_gptq import unpacked
from qlora_cli.model.safetensors_stream import SINGLE
from qlora_cli.quant.layers import quantized_modules
from tests.stored_bases import AWQ, GPTQ, loaded, needs_package, packed, say_stored, write_stored
from tests.tiny import write_tiny_gpt2, write_tiny_model

STORED = [
    ("gptq", GPTQ | {"sym": True, "desc_act": False}),
    ("gptq", GPTQ),
    ("gptq", GPTQ | {"group_size": -1}),
    ("gptq", GPTQ | {"bits": 8}),
    ("gptq", GPTQ | {"bits": 2, "group_size": 64, "desc_act": False}),
    ("awq", AWQ),
    ("awq", AWQ | {"group_size": 64}),
]
RANDOM = [
    *(
        ("gptq", GPTQ | {"bits": bits, **more})
        for bits in (2, 3, 4, 8)
        for more in ({}, {"checkpoint_format": "gptq_v2"})
    ),
    *(("awq", AWQ | {"bits": bits}) for bits in (3, 4, 8)),
]
MODULE = "model.layers.0.mlp.down_proj"


def values_of(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    source = ordinary(folder, dtype)
    return {entry.name: source.read(folder / SINGLE, entry.name) for entry in source.checkpoint.shards[SINGLE]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "stored"), STORED)
def test_hand_packed_weights_are_what_they_stand_for(method, stored, dtype, tmp_path):
    folder, reference = write_stored(tmp_path, method, stored, attention_bias=True)
    found, wanted = values_of(folder, dtype), load_file(reference / SINGLE)
    assert found.keys() == wanted.keys()
    entries = ordinary(folder, dtype).checkpoint.entries()
    for name, value in wanted.items():
        packed_or_bias = name.endswith(("proj.weight", "proj.bias"))
        assert torch.equal(found[name], value.to(dtype) if packed_or_bias else value), name
        assert (entries[name].dtype, entries[name].shape) == (found[name].dtype, tuple(value.shape))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_lie_one_behind_the_other_also_across_words(bits):
    codes = torch.randint(2**bits, (64, 5), generator=torch.Generator().manual_seed(bits))
    streams = [sum(int(code) << bits * at for at, code in enumerate(column)) for column in codes.T]
    words = torch.tensor([[stream >> 32 * at & 0xFFFFFFFF for stream in streams] for at in range(2 * bits)])
    assert torch.equal(unpacked(words.to(torch.uint32).view(torch.int32), bits).long() & 2**bits - 1, codes)
    if bits != 3:
        assert torch.equal(words.to(torch.uint32).view(torch.int32), packed(codes, bits))


def test_a_transposed_weight_is_turned_back(tmp_path):
    """Such a layer of GPT-2 is packed as any other; an ordinary checkpoint has it as (in, out)."""
    folder = write_tiny_gpt2(tmp_path / "gpt2")
    tensors, name = load_file(folder / SINGLE), "h.0.mlp.c_fc"
    weight = tensors.pop(f"{name}.weight")
    scales = torch.linspace(0.01, 0.02, weight.shape[1]).half()[None]
    codes = (weight / scales.float() + 8).round().clamp(0, 15)
    parts = {
        "qweight": packed(codes, 4),
        "qzeros": packed(torch.full((weight.shape[1], 1), 7), 4).T.contiguous(),
        "scales": scales,
        "g_idx": torch.zeros(len(weight), dtype=torch.int32),
    }
    save_file(tensors | {f"{name}.{part}": tensor for part, tensor in parts.items()}, folder / SINGLE)
    say_stored(folder, {"quant_method": "gptq", "bits": 4, "group_size": -1})
    found = values_of(folder, torch.float32)[f"{name}.weight"]
    assert torch.equal(found, (scales * (codes - 8).half()).float())


@pytest.mark.parametrize(
    ("part", "harm", "message"),
    [
        ("qweight", lambda t: t[:-1], r"down_proj\.qweight is \(15, 64\) torch\.int32, needed is \(16, 64\)"),
        ("scales", lambda t: t[:-1], r"down_proj\.qzeros is \(4, 8\) torch\.int32, needed is \(3, 8\)"),
        ("scales", lambda t: t.double(), r"down_proj\.scales is \(4, 64\) torch\.float64"),
        ("qzeros", lambda t: None, r"down_proj\.qzeros is missing: .*down_proj\.qweight needs it"),
        ("scales", lambda t: None, r"down_proj\.scales is missing"),
        ("g_idx", lambda t: None, r"down_proj\.g_idx is missing"),
    ],
)
def test_a_damaged_tensor_is_named_with_its_file_before_any_is_read(part, harm, message, tmp_path):
    folder, _ = write_stored(tmp_path, "gptq", GPTQ)
    change(folder, part, harm)
    with pytest.raises(UserError, match=rf"model\.safetensors: .*{message}"):
        ordinary(folder, torch.float32)


def change(folder: Path, part: str, harm: Any) -> None:
    tensors = load_file(folder / SINGLE)
    changed = harm(tensors.pop(f"{MODULE}.{part}"))
    save_file(tensors if changed is None else {**tensors, f"{MODULE}.{part}": changed.contiguous()}, folder / SINGLE)


def test_a_group_that_is_not_there_is_told(tmp_path):
    folder, _ = write_stored(tmp_path, "gptq", GPTQ)
    change(folder, "g_idx", lambda t: t + 3)
    with pytest.raises(UserError, match=r"down_proj\.g_idx names group 6 of 4"):
        values_of(folder, torch.float32)


@pytest.mark.parametrize(
    ("method", "stored", "kind"),
    [("gptq", GPTQ | {"checkpoint_format": "gptq_p"}, "gptq_p"), ("awq", AWQ | {"version": "gemv"}, "gemv")],
)
def test_other_formats_are_refused_by_name(method, stored, kind, tmp_path):
    folder, _ = write_stored(tmp_path, method, stored)
    with pytest.raises(UserError, match=rf"merging a base in the format {kind} is not available yet, only in"):
        ordinary(folder, torch.float32)


def test_an_activation_that_is_scaled_is_refused(tmp_path):
    folder, _ = write_stored(tmp_path, "awq", AWQ)
    tensors = load_file(folder / SINGLE)
    save_file({**tensors, "model.layers.0.mlp.act.scales": torch.ones(128)}, folder / SINGLE)
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.act\.scales scales an activation"):
        ordinary(folder, torch.float32)


def write_random(folder: Path, method: str, stored: dict[str, Any]) -> Path:
    """A tiny Llama whose packed tensors are any bits, zeros that run over among them, and scales of any group."""
    write_tiny_model(folder, attention_bias=True)
    generator, bits = torch.Generator().manual_seed(stored["bits"]), stored["bits"]
    tensors = load_file(folder / SINGLE)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        outputs, inputs = tensors.pop(name).shape
        groups, module = inputs // stored["group_size"], name.removesuffix(".weight")
        along = (inputs * bits // 32, outputs) if method == "gptq" else (inputs, outputs * bits // 32)
        for part, shape in (("qweight", along), ("qzeros", (groups, outputs * bits // 32))):
            words = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
            tensors[f"{module}.{part}"] = words if part == "qweight" else words.masked_fill_(words % 3 == 0, -1)
        tensors[f"{module}.scales"] = torch.rand(groups, outputs, generator=generator)
        if method == "gptq":
            tensors[f"{module}.g_idx"] = torch.randint(groups, (inputs,), generator=generator).to(torch.int32)
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    say_stored(folder, {"quant_method": method, **stored})
    return folder


@needs_package
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("method", "stored"), RANDOM)
def test_any_bits_are_the_values_of_the_packages_layers(method, stored, dtype, make_recipe, tmp_path):
    folder = write_random(tmp_path / "base", method, stored)
    model, wanted = loaded(make_recipe, folder, compute_dtype=dtype).model, getattr(torch, dtype)
    found, layers = values_of(folder, wanted), quantized_modules(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(found[f"{name}.weight"], layer.dequantized(wanted)), name
        if layer.bias is not None:
            assert torch.equal(found[f"{name}.bias"], layer.bias.to(wanted)), name
    alive = dict(model.named_parameters())
    for name in alive.keys() & found.keys():
        assert torch.equal(found[name].to(wanted), alive[name]), name
