"""Runs with added tokens, from the recipe to the merged model: resumed bit for bit, measured, talked to, quantised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qlora_cli import commands, merging
from qlora_cli.display import QuietReport
from qlora_cli.errors import UserError
from qlora_cli.recipe import dump_recipe
from tests.tiny import write_tiny_model

TOKENS = ["batman", "na"]
"""Words of the rows of tests/conftest.py."""

RUNS = {
    "untied, nf4": {},
    "tied, nf4": {"tied": True},
    "untied, loftq": {"adapter": {"init": "loftq", "loftq": {"iterations": 1, "calibration": 2}}},
    "tied, pissa": {"tied": True, "adapter": {"init": "pissa"}},
    "untied, recomputed": {"training": {"gradient_checkpointing": True}},
}


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.fixture
def recipe_in(make_recipe, tiny_model, tied_model, heldout_file, tmp_path):
    """The recipe of a run by its name in RUNS, in a folder."""

    def made(name: str, folder: str, tokens: list[str] = TOKENS):
        run = RUNS[name]
        return make_recipe(
            model={"name_or_path": str(tied_model if run.get("tied") else tiny_model), "added_tokens": tokens},
            quantization=run.get("quantization", {}),
            adapter=run.get("adapter", {}),
            data={"eval": [{"path": str(heldout_file)}]},
            training={"max_steps": 4, **run.get("training", {})},
            output_dir=str(tmp_path / folder),
        )

    return made


def train(recipe, pause=None):
    commands.train(recipe, b"", QuietReport(), main_process=True, resume="auto", pause_at=pause)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_added_tokens_is_resumed_measured_and_merged(recipe_in, tmp_path, name):
    report = QuietReport()
    for folder, pauses in (("whole", [None]), ("stopped", [2, None])):
        for pause in pauses:
            train(recipe_in(name, folder), pause)
    adapters = [tmp_path / folder / "adapter/adapter_model.safetensors" for folder in ("whole", "stopped")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    rows = {key: rows for key, rows in load_file(adapters[0]).items() if key.endswith("trainable_tokens_delta")}
    assert len(rows) == (1 if name.startswith("tied") else 2)
    assert all((found[0] - found[1]).abs().max() > 1e-3 for found in rows.values()), "they begin as the same mean"
    result = commands.evaluate(recipe_in(name, "whole"), report, commands.Wanted(baseline=True, again=True))
    before = "start" if "init" in str(RUNS[name]) else "base"
    assert result["models"]["adapter"]["loss"] < result["models"][before]["loss"]
    wanted = merging.Wanted(dtype="float32", quantize="nf4")
    merged, quantized = merging.merge(tmp_path / "whole", recipe_in(name, "whole"), report, wanted)["merges"]
    assert merged["same_base"]
    assert merged["certificate"]["held"]
    assert merged["certificate"]["max_abs"] < 1e-3
    assert quantized["certificate"]["mean_kl"] < 1
    config = json.loads((tmp_path / "whole/merged/config.json").read_text())
    assert config["vocab_size"] == 261
    assert config["tie_word_embeddings"] is name.startswith("tied")
    wanted = commands.Wanted(merged=tmp_path / "whole/merged")
    result = commands.evaluate(recipe_in(name, "whole"), report, wanted)
    assert result["models"]["merged"]["loss"] == pytest.approx(result["models"]["adapter"]["loss"], abs=1e-4)


def test_another_order_of_the_tokens_is_refused_where_the_run_is_measured(recipe_in):
    train(recipe_in("tied, nf4", "run"))
    with pytest.raises(UserError, match=r"model.added_tokens: is \['na', 'batman'\], and the run was trained with"):
        commands.evaluate(recipe_in("tied, nf4", "run", TOKENS[::-1]), QuietReport(), commands.Wanted())


def test_they_are_planned_previewed_and_talked_to(recipe_in, tmp_path, qlora):
    recipe = recipe_in("untied, nf4", "run")
    train(recipe)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    planned = json.loads(qlora("plan", path, "--json").out)
    without = tmp_path / "without.yaml"
    without.write_text(dump_recipe(recipe_in("untied, nf4", "run", [])))
    fewer = json.loads(qlora("plan", without, "--json").out)
    more = planned["memory"]["by_kind"]["adapter"] - fewer["memory"]["by_kind"]["adapter"]
    assert more == 2 * 2 * 64 * 4
    assert planned["rows"]["tokens"] < fewer["rows"]["tokens"]
    shown = qlora("preview", path, "--json")
    assert shown.code == 0, shown.err
    assert "batman" in shown.out
    for voice in ([], ["--baseline"]):
        said = qlora("chat", tmp_path / "run", "--prompt", "say na", "--max-new-tokens", "3", *voice)
        assert said.code == 0, said.err
    assert qlora("merge", tmp_path / "run").code == 0
    said = qlora("chat", tmp_path / "run", "--merged", "--prompt", "say na", "--max-new-tokens", "3")
    assert said.code == 0, said.err


def test_an_adapter_with_tokens_is_continued(recipe_in, make_recipe, tmp_path):
    train(recipe_in("untied, nf4", "first"))
    second = recipe_in("untied, nf4", "second")
    adapter = type(second.adapter).model_validate({"from": str(tmp_path / "first/adapter")})
    train(second.model_copy(update={"adapter": adapter}))
    first, then = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("first", "second"))
    assert first.keys() == then.keys()
    assert not any(first[key].equal(then[key]) for key in first if key.endswith("trainable_tokens_delta"))
