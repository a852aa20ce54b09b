"""What packed storage asks of the layers is refused before data or weights are read."""

from __future__ import annotations

import shutil

import pytest

from qlora_cli import commands
from qlora_cli.display import QuietReport
from qlora_cli.errors import UserError
from qlora_cli.model.base import find_base
from qlora_cli.model.skeleton import check_storage
from tests.tiny import write_tiny_gpt2


@pytest.mark.parametrize(
    ("quantization", "told"),
    [
        ({"overrides": {"*.nothing": "nf4"}}, r"quantization\.overrides: '\*\.nothing' matches no linear module"),
        ({"overrides": {"*": "nf4", "*.q_proj": "int4"}}, "'.*q_proj' has no effect: a pattern before it decides"),
        ({"block_size": 96}, r"model\.safetensors: .*q_proj\.weight: has 4,096 values, which is no multiple of"),
        ({"block_size": 128, "embeddings": "nf4"}, r"embed_tokens\.weight: has rows of 64 values"),
        ({"skip_modules": ["nonsense"]}, r"quantization\.skip_modules: 'nonsense' matches no module"),
    ],
)
@pytest.mark.parametrize("kind", [{"data_type": "int2"}, {"data_type": "nf4", "init": "loftq"}])
def test_storage_that_does_not_fit_is_told_before_the_data_is_looked_for(
    quantization, told, kind, make_recipe, tmp_path
):
    """Even a data file that is not there is told after it."""
    kind = dict(kind)
    adapter = {"init": kind.pop("init", "default")}
    recipe = make_recipe(
        quantization={**kind, **quantization},
        adapter=adapter,
        data={"train": [{"path": str(tmp_path / "nowhere.jsonl")}]},
        output_dir=str(tmp_path / "run"),
    )
    with pytest.raises(UserError, match=told):
        commands.train(recipe, b"", QuietReport(), main_process=True, resume="auto", pause_at=None)


def test_no_weight_is_read_and_the_config_stays_as_it_was(tiny_model, make_recipe, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    recipe = make_recipe(model={"name_or_path": str(folder)}, quantization={"data_type": "int2"})
    found = find_base(recipe)
    before = found.config.to_json_string(use_diff=False)
    (folder / "model.safetensors").write_bytes(b"not a weight")
    check_storage(recipe, found)
    assert found.config.to_json_string(use_diff=False) == before


@pytest.mark.parametrize("quantization", [{"data_type": "nf4"}, {"data_type": "none"}, {"data_type": "int8"}])
def test_what_is_not_packed_needs_no_skeleton(quantization, make_recipe, monkeypatch):
    monkeypatch.setattr("qlora_cli.model.skeleton.skeleton", None)
    recipe = make_recipe(quantization=quantization)
    check_storage(recipe, find_base(recipe))


def test_conv1d_layers_fit_as_linear_ones_do(make_recipe, tmp_path):
    model = {"name_or_path": str(write_tiny_gpt2(tmp_path / "gpt2"))}
    recipe = make_recipe(model=model, quantization={"data_type": "int2", "overrides": {"*.c_attn": "nf4"}})
    check_storage(recipe, find_base(recipe))
