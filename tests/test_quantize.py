"""`qlora quantize` stores the base that training would load, and what goes with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qlora_cli.errors import Exit
from qlora_cli.model.base import fingerprint, load_base

CPU = torch.device("cpu")
STORED = {
    "int2": {"data_type": "int2"},
    "nf4 of bitsandbytes": {"data_type": "nf4"},
    "mixed": {"data_type": "int2", "overrides": {"*.q_proj": "nf4"}, "embeddings": "int4", "double_quant": False},
}


@pytest.mark.parametrize("name", STORED)
def test_the_folder_loads_as_the_very_base_that_training_would_load(name, qlora, make_recipe, tiny_model, tmp_path):
    keys = [f"--set=quantization.{key}={json.dumps(value)}" for key, value in STORED[name].items()]
    ended = qlora(
        "quantize", tiny_model, "--out", tmp_path / "out", "--json", *keys, "--set=quantization.compute_dtype=float32"
    )
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    assert result == {
        "out": str(tmp_path / "out"),
        "bytes": (tmp_path / "out/model.safetensors").stat().st_size,
        "table": [],
    }
    quantised = load_base(make_recipe(quantization=STORED[name]), CPU)
    stored = load_base(make_recipe(model={"name_or_path": str(tmp_path / "out")}), CPU)
    assert fingerprint(stored.model) == fingerprint(quantised.model)


def test_a_recipe_with_a_start_stores_it_beside_and_can_be_trained_from_it(qlora, rows_file, tiny_model, tmp_path):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    data = f"data: {{train: [{{path: {rows_file}}}]}}\ntraining: {{max_steps: 1}}\noutput_dir: {tmp_path / 'run'}\n"
    start = "adapter: {r: 4, init: loftq, loftq: {calibration: 2}}\nquantization: {data_type: int2}\n"
    recipe.write_text(f"model: {{name_or_path: {tiny_model}}}\n{start}{data}")
    ended = qlora("quantize", recipe, "--out", out)
    assert ended.code == 0, ended.err
    assert "errors are weighed by what 2 of 12 rows feed into each layer" in ended.err
    assert "14 layers, mean error of outputs" in ended.err
    assert str(out) in ended.out
    recipe.write_text(f"model: {{name_or_path: {out}}}\nadapter: {{from: {out / 'loftq_init'}}}\n{data}")
    ended = qlora("train", recipe)
    assert ended.code == 0, ended.err
    assert f"base     {out}" in ended.err


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--set=quantization.data_type=int8"], Exit.USAGE, "int8 is made of the full-precision checkpoint whenever"),
        (["--set=quantization.data_type=none"], Exit.USAGE, "none is made of the full-precision checkpoint whenever"),
        (["--set=adapter.r=4"], Exit.USAGE, "--set adapter.r=4: changes nothing in what is stored"),
        (["--set=quantization.block_size=96"], Exit.USAGE, "no multiple of quantization.block_size 96"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_leaves_nothing(options, code, told, qlora, tiny_model, tmp_path):
    options = [*options, *(["--set=quantization.data_type=int2"] if "block" in options[0] else [])]
    ended = qlora("quantize", tiny_model, "--out", tmp_path / "out", *options)
    assert (ended.code, [*tmp_path.iterdir()]) == (code, [])
    assert told in ended.err


def test_nothing_is_overwritten_and_nothing_quantised_twice(qlora, tiny_model, tmp_path):
    first = tmp_path / "first"
    assert qlora("quantize", tiny_model, "--out", first).code == 0
    before = {path: path.read_bytes() for path in first.iterdir() if path.is_file()}
    ended = qlora("quantize", tiny_model, "--out", first)
    assert ended.code == Exit.USAGE
    assert "is there already, and nothing is overwritten" in ended.err
    assert {path: path.read_bytes() for path in first.iterdir() if path.is_file()} == before
    ended = qlora("quantize", first, "--out", Path(tmp_path / "second"))
    assert ended.code == Exit.USAGE
    assert "there is nothing left to quantise" in ended.err
