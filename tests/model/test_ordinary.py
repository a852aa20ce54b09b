"""A packed checkpoint read as ordinary weights: those of the live layers, under an ordinary checkpoint's names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qlora_cli.quant.plugin  # noqa: F401 (registers the packed layers)
from qlora_cli.errors import UserError
from qlora_cli.model.ordinary import ordinary
from qlora_cli.model.safetensors_stream import read_checkpoint
from qlora_cli.quant.embedding import PackedEmbedding
from qlora_cli.quant.packed import PackedLayer
from qlora_cli.quant.plugin import PackedConfig
from tests.tiny import write_tiny_gpt2, write_tiny_model

PACKED = {
    "llama": {"data_type": "int2"},
    "gpt2": {"data_type": "nf4", "double_quant": False},
    "with zero points": {"data_type": "int4", "zero_point": True, "block_size": 32},
    "mixed": {"data_type": "nf2", "overrides": {"*.q_proj": "none", "*.down_proj": "fp4"}},
    "with its embedding": {"data_type": "int2", "embeddings": "int4"},
    "tied": {"data_type": "nf4"},
    "tied, with its embedding": {"data_type": "int4", "embeddings": "nf4"},
    "gpt2 with its embedding": {"data_type": "int2", "embeddings": "nf4"},
    "in shards": {"data_type": "int2"},
}


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A plain checkpoint as transformers saves it, and the packed one, by the name of the case."""
    root = tmp_path_factory.mktemp("ordinary")
    sources = {
        "gpt2": write_tiny_gpt2(root / "gpt2"),
        "tied": write_tiny_model(root / "tied", tie_word_embeddings=True),
    }
    found = {}
    for number, (name, settings) in enumerate(PACKED.items()):
        source = next((path for kind, path in sources.items() if kind in name), tiny_model)
        plain, packed = root / f"plain{number}", root / f"packed{number}"
        AutoModelForCausalLM.from_pretrained(source).save_pretrained(plain)
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=PackedConfig(**settings))
        model.save_pretrained(packed, max_shard_size="7KB" if "shards" in name else "5GB")
        found[name] = (plain, packed)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PACKED)
def test_the_values_are_those_of_the_live_layers_bit_for_bit(name, dtype, folders):
    _plain, packed = folders[name]
    source = ordinary(packed, dtype)
    found = {
        entry.name: source.read(packed / shard, entry.name)
        for shard, entries in source.checkpoint.shards.items()
        for entry in entries
    }
    model = AutoModelForCausalLM.from_pretrained(packed)
    layers = {f"{one}.weight": m for one, m in model.named_modules() if isinstance(m, PackedLayer) and not m.shared}
    assert layers
    for tensor, layer in layers.items():
        values = layer.dequantized(dtype)
        assert torch.equal(found.pop(tensor), values.T if layer.transposed else values)
    alive = dict(model.named_parameters()) | dict(model.named_buffers())
    for tensor, value in found.items():
        assert torch.equal(value, alive[tensor]), "what is not packed is as it was"


@pytest.mark.parametrize("name", PACKED)
def test_names_shapes_and_orientation_are_those_of_an_ordinary_checkpoint(name, folders):
    plain, packed = folders[name]
    source, wanted = ordinary(packed, torch.float32), read_checkpoint(plain).entries()
    assert source.checkpoint.entries() == wanted
    for shard, entries in source.checkpoint.shards.items():
        for entry in entries:
            weight = source.read(packed / shard, entry.name)
            assert (weight.dtype, tuple(weight.shape)) == (entry.dtype, entry.shape)
            published = load_file(plain / "model.safetensors")[entry.name]
            assert (weight - published).norm() <= 0.6 * published.norm(), "another weight, or a turned one"


def test_the_shards_of_the_test_part_codes_from_scales(folders):
    index = json.loads((folders["in shards"][1] / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(index[name] != index[name.removesuffix("weight") + "scales"] for name in index if is_packed(name, index))


def is_packed(name: str, index: dict[str, str]) -> bool:
    return name.endswith(".weight") and name.removesuffix("weight") + "scales" in index


def test_a_folder_of_ordinary_weights_is_read_as_it_is(tiny_model):
    source, tensors = ordinary(tiny_model, torch.bfloat16), load_file(tiny_model / "model.safetensors")
    assert source.checkpoint == read_checkpoint(tiny_model)
    for name, tensor in tensors.items():
        read = source.read(tiny_model / "model.safetensors", name)
        assert read.dtype == torch.float32
        assert torch.equal(read, tensor)


@pytest.mark.parametrize(
    ("part", "harm", "message"),
    [
        ("weight", lambda t: t[:-1], r"q_proj\.weight is \(\(1023,\), torch\.uint8\), Storage\(.*needs \(\(1024,\)"),
        ("scales", lambda t: t[:3], r"q_proj\.scales is \(\(3,\), torch\.uint8\)"),
        ("scales", lambda t: t.float(), r"q_proj\.scales is \(\(64,\), torch\.float32\)"),
        ("scales_absmax", lambda t: None, r"q_proj\.scales_absmax is missing: Storage\("),
    ],
)
def test_a_damaged_tensor_is_named_with_its_file(part, harm, message, folders, tmp_path):
    module = "model.layers.1.self_attn.q_proj"
    tensors = load_file(folders["llama"][1] / "model.safetensors")
    changed = harm(tensors.pop(f"{module}.{part}"))
    file = tmp_path / "model.safetensors"
    save_file(tensors if changed is None else {**tensors, f"{module}.{part}": changed.contiguous()}, file)
    (tmp_path / "config.json").write_bytes((folders["llama"][1] / "config.json").read_bytes())
    source = ordinary(tmp_path, torch.float32)
    with pytest.raises(UserError, match=rf"model\.safetensors: model\.layers\.1\.self_attn\.{message}"):
        source.read(file, f"{module}.weight")


def test_the_embedding_of_the_test_is_packed(folders):
    model = AutoModelForCausalLM.from_pretrained(folders["tied, with its embedding"][1])
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)
    assert model.get_output_embeddings().holder is model.get_input_embeddings()
