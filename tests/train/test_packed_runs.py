"""Runs on packed bases of every data type: resumed bit for bit, measured, merged onto what they were trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_cli import commands, merging
from qlora_cli.display import QuietReport
from tests.tiny import write_tiny_model

STORED = {
    "int4": {"data_type": "int4"},
    "nf2": {"data_type": "nf2", "double_quant": False},
    "int2": {"data_type": "int2"},
    "int4 with zero point": {"data_type": "int4", "zero_point": True, "clip": "2sigma", "block_size": 32},
    "mixed": {"data_type": "int2", "overrides": {"*.layers.0.*": "nf4", "*.down_proj": "none"}},
    "with its embedding": {"data_type": "nf4", "embeddings": "int4"},
    "the embedding alone": {"data_type": "none", "embeddings": "nf2"},
    "tied, with its embedding": {"data_type": "int2", "embeddings": "fp4"},
}


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a head that is its embedding."""
    return write_tiny_model(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", STORED)
def test_a_run_on_a_packed_base_is_resumed_measured_and_merged(
    name, checkpointing, make_recipe, tiny_model, tied_model, heldout_file, tmp_path
):
    report = QuietReport()

    def recipe_in(folder: str):
        return make_recipe(
            model={"name_or_path": str(tied_model if "tied" in name else tiny_model)},
            quantization=STORED[name],
            data={"eval": [{"path": str(heldout_file)}]},
            training={"max_steps": 4, "gradient_checkpointing": checkpointing},
            output_dir=str(tmp_path / folder),
        )

    for folder, pauses in (("whole", [None]), ("stopped", [2, None])):
        for pause in pauses:
            commands.train(recipe_in(folder), b"", report, main_process=True, resume="auto", pause_at=pause)
    adapters = [tmp_path / folder / "adapter/adapter_model.safetensors" for folder in ("whole", "stopped")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    result = commands.evaluate(recipe_in("whole"), report, commands.Wanted(baseline=True, again=True))
    assert result["models"]["adapter"]["loss"] < result["models"]["base"]["loss"]
    wanted = merging.Wanted(dtype="float32")
    merged = merging.merge(tmp_path / "whole", recipe_in("whole"), report, wanted)["merges"][0]
    assert merged["same_base"]
    assert merged["certificate"]["max_abs"] < 1e-3
    assert merged["certificate"]["top1_agreement"] == 1.0
