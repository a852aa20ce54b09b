"""The keys of evaluation: seen in what `qlora eval` tells and writes of every row, and in what a run measures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from safetensors.torch import load_file

from qlora_cli.data.formats import FORMATS
from qlora_cli.data.hub import HubData
from qlora_cli.data.rows import Mark, Read
from qlora_cli.errors import UserError
from qlora_cli.recipe import Recipe
from tests.conftest import conversation
from tests.live_keys.bench import Bench, Live, Measured, becomes
from tests.live_keys.task_keys import OF_TASK
from tests.live_keys.training_keys import logged

SUITE, SOURCE = "evaluation.suites[0]", "evaluation.suites[0].data[0]"
HUB = "someone/rows"


def quiz(number: int, label: str) -> str:
    """Questions with choices; each has `label` and its number in it."""
    rows = [{"query": f"{label} {at}", "choices": [f"yes {at}", "no"], "gold": at % 2} for at in range(number)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def harness_task(name: str, rows: Path) -> str:
    """A task of lm-evaluation-harness over a quiz."""
    files = {"data_files": {"test": str(rows)}, "cache_dir": str(rows.parent / "harness")}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    asked = {"doc_to_text": "{{query}}", "doc_to_choice": "choices", "doc_to_target": "gold"}
    metrics = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    return yaml.safe_dump({**task, "output_type": "multiple_choice", **asked, "metric_list": metrics})


def write_suite_rows(folder: Path) -> dict[str, Path]:
    """The files that the suites below name."""
    written = {"quiz.jsonl": quiz(4, "asked"), "solved.jsonl": quiz(4, "solved")}
    written |= {f"{name}.yaml": harness_task(name, folder / "quiz.jsonl") for name in ("one", "two")}
    for name, content in written.items():
        (folder / name).write_text(content)
    return {name.split(".")[0]: folder / name for name in written}


# ── what is looked at ────────────────────────────────────────────────────────────────────────────────────────────────


def of_eval(see: Callable[[Measured], Any]) -> Callable[[Bench, Recipe], Any]:
    """Something seen in `qlora eval` of the untrained base."""
    return lambda bench, recipe: see(bench.measured(recipe))


def kind_and_figures(measured: Measured) -> tuple[str, set[str]]:
    return measured.suite["suite"], set(measured.figures)


def column(name: str) -> Callable[[Measured], list[Any]]:
    """A column of the answers."""
    return lambda measured: [answer[name] for answer in measured.answers]


def files(measured: Measured) -> set[str]:
    """The files that the rows come from."""
    return {Path(answer["where"].rpartition(":")[0]).name for answer in measured.answers}


def estimates(measured: Measured) -> set[str]:
    """What is told of each figure."""
    return {name for figure in measured.figures.values() for name in figure}


def largest_step(measured: Measured) -> int:
    """The most answers that are written at once, a token each."""
    return max(len(ids) for ids in measured.watch.inputs if ids.shape[1] == 1)


def longest_answer(measured: Measured) -> int:
    return max(len(answer["prediction"]) for answer in measured.answers)


def read_texts(bench: Bench, recipe: Recipe) -> str:
    """All that the model reads, as text."""
    ids = [token for batch in bench.measured(recipe).watch.inputs for token in batch.flatten().tolist()]
    return str(bench.prepared(recipe).base.tokenizer.decode(ids))


def asked_and_expected(bench: Bench, recipe: Recipe) -> str:
    """Prompt and reference of the first row, or the error."""
    try:
        (answer, *_) = bench.measured(recipe).answers
    except UserError as error:
        return str(error)
    return "".join((answer.get("prompt", ""), *answer.get("references", ())))


def asked_of_the_hub(bench: Bench, recipe: Recipe) -> tuple[Any, ...]:
    """Id, configuration and split of the data set asked for; the hub is played by a recorder with two splits."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None, *, split: str) -> datasets.Dataset:
        calls.append((path, name, split))
        return datasets.Dataset.from_list([conversation("a question", "an answer")])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.load_dataset", load_dataset)
        patch.setattr("datasets.get_dataset_split_names", lambda path, name: ["train", "test"])
        bench.measure_anew(recipe)
    (call,) = set(calls)
    return call


def streamed_from_the_hub(bench: Bench, recipe: Recipe) -> set[bool]:
    """Whether the data set is asked for as a stream."""
    seen = []

    def read(self: HubData, start: Any = None) -> Iterator[Read]:
        seen.append(self.streaming)
        yield Read(1, conversation("a question", "an answer"), Mark(1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.get_dataset_split_names", lambda path, name: ["train", "test"])
        patch.setattr(HubData, "read", read)
        patch.setattr(HubData, "digest", lambda self: f"a row of a suite {self.streaming}")
        bench.measure_anew(recipe)
    return set(seen)


def step_of_the_adapter(bench: Bench, recipe: Recipe) -> list[int]:
    """The steps whose checkpoint holds the weights of the run's adapter."""
    run = bench.trained(recipe).folder
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")

    def is_it(checkpoint: Path) -> bool:
        weights = load_file(next(checkpoint.rglob("adapter_model.safetensors")))
        return all(adapter[name].equal(weight) for name, weight in weights.items())

    return [int(path.name.removeprefix("step-")) for path in sorted((run / "checkpoints").iterdir()) if is_it(path)]


# ── the tables ───────────────────────────────────────────────────────────────────────────────────────────────────────


def suites(suite: str, path: str | None = None, **keys: Any) -> dict[str, Any]:
    """A recipe's only suite, called `it`; answers are of one token."""
    data = {"data": [{"path": path}]} if path else {}
    short = {"evaluation.max_new_tokens": 1} if suite == "generate" else {}
    return {"evaluation.suites": [{"suite": suite, "name": "it", **data, **keys}], **short}


CHOICE = suites("choice", "$quiz")
GENERATE = suites("generate")
HARNESS = suites("lm_eval", tasks=["$one"])
CLASSES = {**OF_TASK["classification"], "data.train[0].path": "$task_classification", "data.eval": []}
QUESTIONS = {**OF_TASK["squad"], "data.train[0].path": "$task_squad", "data.eval": []}
NEVER_BETTER = {**GENERATE, "evaluation.during_training": ["it"], "training.eval_steps": 2, "training.save_steps": 2}
BY_MATCHES = {**NEVER_BETTER, "evaluation.best_metric": "it.exact_match"}
LOSSES = {"loss", "perplexity", "bits_per_byte", "token_accuracy"}


def kind(name: str, figures: set[str], other: tuple[str, set[str]], beside: Any, along: Any = None) -> Live:
    """A suite by its kind and figures, beside another one."""
    return Live(
        f"{SUITE}.suite", name, of_eval(kind_and_figures), becomes(other, (name, figures)), beside, along or {}
    )


KINDS = [
    kind("loss", LOSSES, ("generate", {"exact_match"}), suites("generate", max_new_tokens=None) and GENERATE),
    kind("generate", {"exact_match"}, ("loss", LOSSES), suites("loss")),
    kind("choice", {"accuracy", "accuracy_norm", "accuracy_bytes"}, ("loss", LOSSES), suites("loss"), CHOICE),
    kind("classify", {"accuracy"}, ("loss", {"loss"}), {**CLASSES, **suites("loss", "$also_classification")}),
    kind(
        "squad",
        {"squad_exact_match", "squad_f1"},
        ("loss", {"loss"}),
        {**QUESTIONS, **suites("loss", "$also_squad")},
    ),
    kind("lm_eval", {"one.acc"}, ("loss", LOSSES), suites("loss"), HARNESS),
]
