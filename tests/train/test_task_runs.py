"""Every task from the recipe to the merged model: trained, resumed, measured, merged and loaded as its card says."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file

WEIGHTS = "adapter_model.safetensors"
COLOURS = ("red", "green", "blue", "black")


class Kind(NamedTuple):
    """A model of tests/architectures.py, its task, the task's keys, rows, and the figures that `qlora eval` gives."""

    architecture: str
    task: str
    model: dict[str, Any]
    row: Callable[[int], dict[str, Any]]
    figures: set[str]


def pair(number: int) -> dict[str, Any]:
    return {"source": f"word {number}", "target": f"{'w' * (number % 4 + 1)} {number}"}


def labelled(number: int) -> dict[str, Any]:
    return {"sentence1": "a" * (number % 5 + 1), "sentence2": f"b {number}", "label": ["no", "yes"][number % 2]}


def scored(number: int) -> dict[str, Any]:
    return {"text": f"so much: {'x' * number}", "score": number / 4}


def asked(number: int) -> dict[str, Any]:
    colour = COLOURS[number % 4]
    context = f"{'it was late. ' * (number % 3)}the ball is {colour} today"
    answers = {"text": [colour], "answer_start": [context.index(colour)]}
    return {"id": str(number), "question": "which?", "context": context, "answers": answers}


TEXT = {"loss", "perplexity", "bits_per_byte", "token_accuracy", "exact_match"}
KINDS = {
    "bart": Kind("bart", "seq2seq_lm", {}, pair, TEXT),
    "t5": Kind("t5", "seq2seq_lm", {}, pair, TEXT),
    "bert": Kind("bert", "sequence_classification", {"labels": ["no", "yes"]}, labelled, {"loss", "accuracy"}),
    "llama": Kind("llama", "sequence_classification", {"labels": ["no", "yes"]}, labelled, {"loss", "accuracy"}),
    "roberta": Kind("roberta", "sequence_classification", {"num_labels": 1}, scored, {"loss", "pearson", "spearman"}),
    "deberta": Kind("deberta", "question_answering", {}, asked, {"loss", "squad_exact_match", "squad_f1"}),
}


@pytest.fixture
def recipe_of(architecture, tmp_path) -> Callable[..., Path]:
    """Writes the recipe of a kind, with sections merged over it; returns its path."""

    def write(kind: Kind, folder: str, **sections: dict[str, Any]) -> Path:
        for name, numbers in (("train", range(16)), ("heldout", range(16, 24))):
            rows = "".join(json.dumps(kind.row(number)) + "\n" for number in numbers)
            (tmp_path / f"{name}.jsonl").write_text(rows)
        values: dict[str, Any] = {
            "model": {"name_or_path": str(architecture(kind.architecture)), "task": kind.task, **kind.model},
            "quantization": {"data_type": "nf4", "compute_dtype": "float32"},
            "adapter": {"r": 4, "alpha": 8},
            "data": {
                "train": [{"path": str(tmp_path / "train.jsonl")}],
                "eval": [{"path": str(tmp_path / "heldout.jsonl")}],
                "max_length": 48,
            },
            "training": {
                "max_steps": 4,
                "micro_batch_size": 4,
                "gradient_accumulation_steps": 1,
                "learning_rate": 5e-3,
                "optimizer": "adamw",
                "logging_steps": 1,
                "seed": 5,
            },
            "evaluation": {"bootstrap_resamples": 20},
            "output_dir": str(tmp_path / folder),
        }
        if kind.task == "question_answering":
            values["data"]["doc_stride"] = 8
        if kind.task == "seq2seq_lm":
            values["evaluation"] |= {"max_new_tokens": 6, "num_beams": 2}
        for name, section in sections.items():
            values[name] = {**values[name], **section}
        path = tmp_path / f"{folder}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def digest(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / WEIGHTS).read_bytes()).hexdigest()


@pytest.mark.parametrize("name", KINDS)
def test_it_trains_resumes_measures_and_merges(name, recipe_of, qlora, tmp_path):
    kind = KINDS[name]
    recipe = recipe_of(kind, "run")
    assert qlora("train", recipe).code == 0
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "eval_loss" in losses[-1]
    parts = recipe_of(kind, "parts")
    assert qlora("train", parts, "--max-steps", 2).code == 0
    assert qlora("train", parts).code == 0
    assert digest(tmp_path / "parts") == digest(tmp_path / "run"), "a resumed run is the run that was never stopped"
    assert qlora("merge", tmp_path / "run", "--dtype", "float32").code == 0
    merged = tmp_path / "run" / "merged"
    ended = qlora("eval", tmp_path / "run", "--baseline", "--merged", merged, "--json")
    assert ended.code == 0, ended.err
    models = json.loads(ended.out)["models"]
    assert list(models) == ["base", "adapter", "merged"]
    assert set(models["adapter"]) == kind.figures
    assert models["adapter"]["loss"] == pytest.approx(losses[-1]["eval_loss"], rel=1e-5)
    assert models["merged"]["loss"] == pytest.approx(models["adapter"]["loss"], rel=1e-4)
    assert models["base"]["loss"] != models["adapter"]["loss"]


@pytest.mark.parametrize("name", KINDS)
def test_no_result_depends_on_how_a_batch_is_cut(name, recipe_of, qlora, tmp_path):
    kind = KINDS[name]
    cuts = ((4, 1), (1, 4), (2, 2))
    adapters = []
    for size, steps in cuts:
        folder = f"run{size}"
        training = {"micro_batch_size": size, "gradient_accumulation_steps": steps}
        recipe = recipe_of(kind, folder)
        values = yaml.safe_load(recipe.read_text())
        values["training"] |= training
        recipe.write_text(yaml.safe_dump(values))
        assert qlora("train", recipe).code == 0
        adapters.append(load_file(tmp_path / folder / "adapter" / WEIGHTS))
    first = adapters[0]
    first.pop("base_model.model.qa_outputs.bias", None)  # its gradient is zero but for rounding: a softmax ignores it
    size = torch.stack([tensor.norm() for tensor in first.values()]).norm()
    for other in adapters[1:]:
        assert torch.stack([(other[key] - tensor).norm() for key, tensor in first.items()]).norm() <= 1e-4 * size


@pytest.mark.parametrize("name", KINDS)
def test_the_code_on_the_card_loads_the_adapter(name, recipe_of, qlora, tmp_path, monkeypatch):
    kind = KINDS[name]
    recipe = recipe_of(kind, "run", quantization={"data_type": "none"})
    assert qlora("train", recipe).code == 0
    adapter = tmp_path / "run" / "adapter"
    (code,) = re.findall(r"```python\n(.*?)```", (adapter / "README.md").read_text(), re.DOTALL)
    found: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(adapter)), found)
    loaded = found["model"].state_dict()
    saved = found["model"].peft_config["default"].modules_to_save or []
    heads = {f"base_model.model.{module}.": f"base_model.model.{module}.modules_to_save.default." for module in saved}
    for key, tensor in load_file(adapter / WEIGHTS).items():
        for stored, wrapped in heads.items():
            if key.startswith(stored):
                assert torch.equal(loaded[key.replace(stored, wrapped)], tensor), key
    assert bool(saved) == (kind.task != "seq2seq_lm")
    assert any("lora_B" in key and loaded[key].any() for key in loaded)
