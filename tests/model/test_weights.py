"""A weight by the name of its module, however the checkpoint names, turns and splits it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from qlora_cli.errors import UserError
from qlora_cli.model import weights
from qlora_cli.model.adapter import attach_adapter, linear_names
from qlora_cli.model.base import load_base
from tests.tiny import write_tiny_gpt2


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama, in shards and in bfloat16 too, and a GPT-2 with and without the prefix of its names."""
    root = tmp_path_factory.mktemp("weights")
    llama = AutoModelForCausalLM.from_pretrained(tiny_model)
    llama.save_pretrained(root / "sharded", max_shard_size="100KB")
    llama.to(torch.bfloat16).save_pretrained(root / "bfloat16")
    AutoModelForCausalLM.from_pretrained(write_tiny_gpt2(root / "hub gpt2")).save_pretrained(root / "gpt2")
    assert len([*(root / "sharded").glob("*.safetensors")]) > 2
    return {"llama": tiny_model} | {path.name: path for path in root.iterdir()}


def in_memory(model: Any, module: str) -> torch.Tensor:
    """The weight (out, in) fp32 of a live layer."""
    layer = model.get_submodule(module)
    return (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).detach().float()


@pytest.mark.parametrize("name", ["llama", "sharded", "bfloat16", "hub gpt2", "gpt2"])
def test_every_linear_weight_comes_as_the_layer_multiplies_with_it(name, folders):
    model = AutoModelForCausalLM.from_pretrained(folders[name])
    of_checkpoint = weights.of_checkpoint(folders[name], model)
    linear = [one for one in linear_names(model) if one != "lm_head"]  # GPT-2's is no tensor of the checkpoint
    assert len(linear) in (8, 14)
    for module in linear:
        layer = model.get_submodule(module)
        x = torch.randn(5, layer.weight.shape[0 if isinstance(layer, Conv1D) else 1])
        wanted = nn.functional.linear(x, of_checkpoint(module), None if layer.bias is None else layer.bias.float())
        torch.testing.assert_close(layer.float()(x), wanted, rtol=1e-4, atol=1e-4)
        assert of_checkpoint(module).dtype == torch.float32
        assert torch.equal(of_checkpoint(module), in_memory(model, module))


@pytest.mark.parametrize("name", ["llama", "hub gpt2"])
def test_a_model_that_is_packed_and_adapted_turns_no_weight(name, folders, make_recipe):
    recipe = make_recipe(model={"name_or_path": str(folders[name])}, quantization={"data_type": "int2"})
    base = load_base(recipe, torch.device("cpu"))
    attach_adapter(base, recipe.adapter)
    plain = AutoModelForCausalLM.from_pretrained(folders[name])
    found = weights.of_checkpoint(folders[name], base.model)
    for module in linear_names(plain):
        assert module == "lm_head" or torch.equal(found(module), in_memory(plain, module))


def test_a_module_without_a_tensor_of_its_own_is_named(folders):
    weight = weights.of_checkpoint(folders["gpt2"], AutoModelForCausalLM.from_pretrained(folders["gpt2"]))
    with pytest.raises(UserError, match=r"gpt2: no tensor for lm_head: transformers makes it of others"):
        weight("lm_head")


def test_a_weight_that_is_not_finite_is_named_with_its_file(folders, tmp_path):
    module = "model.layers.1.mlp.up_proj"
    for path in folders["sharded"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
        if path.suffix == ".safetensors" and f"{module}.weight" in (tensors := load_file(path)):
            shard = path.name
            tensors[f"{module}.weight"][3, 4] = torch.inf
            save_file(tensors, tmp_path / shard, {"format": "pt"})
    weight = weights.of_checkpoint(tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path))
    assert weight("model.layers.0.mlp.up_proj").isfinite().all()
    with pytest.raises(UserError, match=rf"{shard}: {module}\.weight: holds NaN or infinity"):
        weight(module)
