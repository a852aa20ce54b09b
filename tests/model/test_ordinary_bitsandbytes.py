"""A checkpoint of bitsandbytes' own read as ordinary weights: those of the live layers, under ordinary names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.errors import UserError
from qlora_cli.model.fused import frozen_weight
from qlora_cli.model.ordinary import Ordinary, ordinary
from qlora_cli.model.safetensors_stream import read_checkpoint
from qlora_cli.quant.layers import quantized_modules
from tests.stored_bases import loaded, store_by_bitsandbytes
from tests.tiny import write_tiny_gpt2, write_tiny_model

CASES = {
    "nf4, double": {},
    "fp4, single": {"data_type": "fp4", "double_quant": False},
    "stored from float16": {"dtype": torch.float16},
    "in shards": {"max_shard_size": "3KB"},
    "tied": {},
    "rows of no whole blocks": {},  # where bitsandbytes' own CPU kernel is wrong
    "gpt2": {},
}
MODULE = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """An ordinary checkpoint and the stored one, by the name of the case."""
    root = tmp_path_factory.mktemp("bitsandbytes")
    found = {}
    for number, (name, stored) in enumerate(CASES.items()):
        plain, changes = root / f"plain{number}", {"tie_word_embeddings": name == "tied"}
        if name == "rows of no whole blocks":
            changes |= {"hidden_size": 48, "intermediate_size": 80}
        if name == "gpt2":
            write_tiny_gpt2(plain)
        else:
            write_tiny_model(plain, **changes)
        found[name] = (plain, store_by_bitsandbytes(plain, root / f"stored{number}", **stored))
    return found


def tensors_of(source: Ordinary) -> dict[str, torch.Tensor]:
    shards = source.checkpoint.shards.items()
    return {e.name: source.read(source.checkpoint.folder / shard, e.name) for shard, some in shards for e in some}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_the_values_are_those_of_the_live_layers_bit_for_bit(name, dtype, folders, make_recipe):
    _plain, stored = folders[name]
    model = loaded(make_recipe, stored, compute_dtype=dtype).model
    wanted = getattr(torch, dtype)
    found = tensors_of(ordinary(stored, wanted))
    layers = quantized_modules(model)
    assert len(layers) == (8 if name == "gpt2" else 14)
    for module, layer in layers.items():
        values = found.pop(f"{module}.weight")
        assert values.dtype == wanted
        assert torch.equal(values.T if name == "gpt2" else values, frozen_weight(layer).read(wanted))
    alive = dict(model.named_parameters()) | dict(model.named_buffers())
    for tensor, value in found.items():
        assert torch.equal(value.to(alive[tensor].dtype), alive[tensor]), "what is not packed is as it was"


@pytest.mark.parametrize("name", CASES)
def test_names_shapes_and_orientation_are_those_of_an_ordinary_checkpoint(name, folders):
    plain, stored = folders[name]
    source, published = ordinary(stored, torch.float32), load_file(plain / "model.safetensors")
    if name == "gpt2":  # whose hub checkpoints lack the prefix that transformers saves
        published = {f"transformer.{tensor}": value for tensor, value in published.items()}
    shapes = {tensor: entry.shape for tensor, entry in source.checkpoint.entries().items()}
    assert shapes == {tensor: tuple(value.shape) for tensor, value in published.items()}
    for tensor, value in tensors_of(source).items():
        assert value.dtype == source.checkpoint.entries()[tensor].dtype
        wanted = published[tensor].float()
        assert (value.float() - wanted).norm() <= 0.2 * wanted.norm(), "another weight, or a turned one"


def test_the_shards_of_the_test_part_codes_from_scales(folders):
    index = json.loads((folders["in shards"][1] / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(index[name] != index.get(f"{name}.absmax", index[name]) for name in index)


def harmed(folder: Path, tmp_path: Path, part: str, harm) -> Path:
    tensors = load_file(folder / "model.safetensors")
    changed = harm(tensors.pop(f"{MODULE}.{part}"))
    rest = tensors if changed is None else {**tensors, f"{MODULE}.{part}": changed.contiguous()}
    save_file(rest, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    return tmp_path


RECORD = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("part", "harm", "message"),
    [
        ("weight", lambda t: t[:-1], r"q_proj\.weight is \(2047, 1\) torch\.uint8, needed is \(2048, 1\) torch\.uint8"),
        ("weight.absmax", lambda t: t[:3], r"q_proj\.weight\.absmax is \(3,\) torch\.uint8, needed is \(64,\)"),
        ("weight.absmax", lambda t: t.float(), r"q_proj\.weight\.absmax is \(64,\) torch\.float32"),
        ("weight.nested_absmax", lambda t: None, r"q_proj\.weight\.nested_absmax is missing: .*__nf4 needs it"),
        ("weight", lambda t: None, r"q_proj\.weight is missing: .*__nf4 needs it"),
        (RECORD, lambda t: t[:-1], r"quant_state\.bitsandbytes__nf4 is damaged \("),
        (RECORD, lambda t: torch.tensor(list(b'{"shape": [2]}'), dtype=torch.uint8), r"damaged \(it has \['shape'\]\)"),
    ],
)
def test_a_damaged_tensor_is_named_with_its_file_before_any_is_read(part, harm, message, folders, tmp_path):
    folder = harmed(folders["nf4, double"][1], tmp_path, part, harm)
    with pytest.raises(UserError, match=rf"model\.safetensors: .*{message}"):
        ordinary(folder, torch.float32)


def test_eight_bits_are_refused_as_in_training(tmp_path):
    folder = write_tiny_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    stored = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    with pytest.raises(UserError, match=r"already quantised \(bitsandbytes, 8 bits\)"):
        ordinary(folder, torch.float32)


def test_nothing_of_the_storage_is_left(folders):
    names = ordinary(folders["in shards"][1], torch.float32).checkpoint.entries().keys()
    assert not [name for name in names if "quant" in name or "absmax" in name]
    assert read_checkpoint(folders["in shards"][1]).entries().keys() - names
