"""The suite `choice` agrees with lm-evaluation-harness on local tasks: per row to 1e-4 nats, and in every figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.evaluate.choice import ChoiceScore
from qlora_cli.evaluate.choice_metrics import metrics_of
from qlora_cli.evaluate.choice_rows import ChoiceRow
from qlora_cli.model.base import Base
from tests.evaluate.choices import base_in, continuations, mmlu, questions, read, scores_of, write

pytest.importorskip("lm_eval")

CHOICE_METRICS = {"accuracy": "acc", "accuracy_norm": "acc_norm", "accuracy_bytes": "acc_bytes"}
TASKS: dict[str, dict[str, Any]] = {
    "questions": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query|trim}}{{'\nAnswer:' if 'Question:' in query else ''}}",
        "doc_to_choice": "{{choices|map('trim')|list}}",
        "doc_to_target": "gold",
    },
    "mmlu": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{input}}",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "{{['A', 'B', 'C', 'D'].index(output)}}",
    },
    "continuations": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context|trim}}",
        "doc_to_target": "{{' ' + continuation|trim}}",
    },
}
"""Tasks of the harness in its own words, one for each shape of file."""


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Base:
    return base_in(tiny_model)


def harness(base: Base, kind: str, path: str, cache: Path) -> tuple[list[list[tuple[float, bool]]], dict[str, float]]:
    """Every answer of the harness in the order of the rows, and its figures. Logarithms and sums are of float64."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager, get_task_dict

    names = ["acc", "perplexity"] if kind == "continuations" else list(CHOICE_METRICS.values())
    task = TASKS[kind] | {
        "task": f"local_{kind}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": path}, "cache_dir": str(cache)},
        "test_split": "test",
        "metric_list": [
            {
                "metric": name,
                "aggregation": "perplexity" if name == "perplexity" else "mean",
                "higher_is_better": name != "perplexity",
            }
            for name in names
        ],
    }
    model = HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=4, softmax_dtype=torch.float64)
    # what simple_evaluate calls; the rest of it asks pip and git about the machine, which takes ten seconds
    tasks = get_task_dict([task], TaskManager(include_defaults=False))
    found = evaluator.evaluate(model, tasks, bootstrap_iters=0, log_samples=True)
    samples = sorted(found["samples"][f"local_{kind}"], key=lambda sample: sample["doc_id"])
    answers = [[(float(value), str(greedy) == "True") for value, greedy in each["filtered_resps"]] for each in samples]
    return answers, {name: found["results"][f"local_{kind}"][f"{name},none"] for name in names}


def check(base: Base, kind: str, path: str, cache: Path) -> list[list[ChoiceScore]]:
    """The scores, after every one and every figure was found to be the harness's."""
    rows: Sequence[ChoiceRow] = read(path)
    scores = scores_of(base, rows, token_budget=300)
    answers, figures = harness(base, kind, path, cache)
    for each, wanted in zip(scores, answers, strict=True):
        assert [score.logprob for score in each] == pytest.approx([logprob for logprob, _ in wanted], abs=1e-4)
        assert [score.is_greedy for score in each] == [is_greedy for _, is_greedy in wanted]
    for name, metric in metrics_of(rows).items():
        if name != "accuracy_by_group":
            wanted_figure = figures[CHOICE_METRICS.get(name, name)]
            assert metric.figure(metric.rows(scores, rows)) == pytest.approx(wanted_figure, rel=1e-4)
    return scores


@pytest.mark.parametrize(("kind", "make"), [("questions", questions), ("continuations", continuations), ("mmlu", mmlu)])
def test_made_up_rows_score_the_same(base: Base, kind: str, make: Any, tmp_path: Path) -> None:
    rows = make(24, seed=3)
    long = make(1, seed=4)[0]
    column = {"questions": "query", "continuations": "context", "mmlu": "input"}[kind]
    rows.append(long | {column: "long " * 150 + long[column]})  # more bytes than the model reads
    scores = check(base, kind, write(tmp_path / "rows.jsonl", rows), tmp_path / "cache")
    assert [bool(each[0].num_cut) for each in scores] == [False] * 24 + [True]


@pytest.mark.parametrize(
    ("kind", "name", "model"),
    [
        ("questions", "piqa", "stories260k-hf"),
        ("questions", "piqa", "tinystories-656k-hf"),
        ("questions", "arc_easy", "stories260k-hf"),
        ("questions", "arc_easy", "tinystories-656k-hf"),
        ("continuations", "lambada_openai", "stories260k-hf"),  # on the other, a tokenizer at which the harness stops
    ],
)
def test_real_rows_score_the_same(shared: Path, model: str, kind: str, name: str, tmp_path: Path) -> None:
    file = shared / "text" / "llm-foundry-eval" / f"{name}.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[100:124]]
    path = write(tmp_path / f"{name}.jsonl", rows)
    check(base_in(shared / "weights" / model), kind, path, tmp_path / "cache")


def test_shots_are_read_as_the_harness_reads_the_same_text(base: Base, tmp_path: Path) -> None:
    """The context with its solved examples, handed to the harness as a question that is asked already."""
    rows = read(write(tmp_path / "rows.jsonl", questions(8)), shots=2)
    asked = [
        {"query": row.context, "choices": [choice.strip() for choice in row.choices], "gold": row.gold} for row in rows
    ]
    path = write(tmp_path / "asked.jsonl", asked)
    TASKS["asked"] = TASKS["questions"] | {"doc_to_text": "{{query}}"}
    answers, _ = harness(base, "asked", path, tmp_path / "cache")
    for each, wanted in zip(scores_of(base, rows), answers, strict=True):
        assert [score.logprob for score in each] == pytest.approx([logprob for logprob, _ in wanted], abs=1e-4)
