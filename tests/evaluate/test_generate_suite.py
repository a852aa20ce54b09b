"""Answers are scored against all their references, by the metrics that the suite names, whatever the batch size."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.errors import UserError
from qlora_cli.evaluate.measuring import figures
from qlora_cli.evaluate.metrics import METRICS
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.schema import Source
from tests.evaluate.opening import answers_of, base_of, context, opened, recipe_of, write

TEXT_METRICS = [
    name for name, metric in METRICS.items() if metric.kind == "text" and name not in ("gsm8k", "json_equal")
]
"""Of answers in words."""


def asking(model: Path, task: str = "causal_lm", **evaluation: Any) -> Recipe:
    data = {"train": [{"path": "none.jsonl"}], "max_length": 64}
    return recipe_of(
        {"name_or_path": str(model), "task": task}, data=data, evaluation={"max_new_tokens": 6, **evaluation}
    )


def pairs(number: int) -> list[dict[str, str]]:
    return [{"prompt": f"na{' na' * (index % 4)} {index}", "completion": f"batman {index}"} for index in range(number)]


@pytest.mark.parametrize(
    ("task", "name", "beams"), [("causal_lm", "llama", 1), ("seq2seq_lm", "bart", 1), ("seq2seq_lm", "bart", 3)]
)
def test_no_answer_changes_with_the_batch_size(
    task: str, name: str, beams: int, architecture: Callable[[str], Path], tmp_path: Path
) -> None:
    source = write(tmp_path / "rows.jsonl", pairs(9))
    told = []
    for size in (1, 3, 50):
        recipe = asking(architecture(name), task, batch_size=size, num_beams=beams)
        suite = opened(recipe, suite="generate", data=[source], metrics=TEXT_METRICS)
        base = base_of(recipe)
        if task == "seq2seq_lm":  # which stops at once, untrained
            base.model.final_logits_bias[:, list(base.stop_token_ids)] = -100.0
        answers = answers_of(suite, base)
        told.append((answers, figures(suite, answers)))
    assert told[0] == told[1] == told[2]
    answers, found = told[0]
    assert [answer["references"] for answer in answers] == [[row["completion"]] for row in pairs(9)]
    assert any(answer["generated"] for answer in answers)
    assert set(found) == set(TEXT_METRICS)


def test_rows_with_the_same_prompt_are_one_question(tiny_model: Path, tmp_path: Path) -> None:
    rows = [("say a", "1"), ("say b", "2"), ("say a", "3"), ("say a", "1")]
    source = write(tmp_path / "rows.jsonl", [{"prompt": prompt, "completion": answer} for prompt, answer in rows])
    recipe = asking(tiny_model)
    suite = opened(recipe, suite="generate", data=[source])
    answers = answers_of(suite, base_of(recipe))
    assert [answer["references"] for answer in answers] == [["1", "3", "1"], ["2"]]
    assert [answer["where"].rpartition(":")[2] for answer in answers] == ["1", "2"]
    right = [{**answer, "generated": " 3\n"} for answer in answers]
    assert figures(suite, right) == {"exact_match": 0.5}
    assert suite.sample is not None
    assert suite.sample(answers[1]) == {"prompt": answers[1]["prompt"], "expected": "2"}
    assert opened(recipe, suite="generate", data=[source], limit=1).num_rows == 1, "a limit is of questions"


def test_e2e_has_several_references_a_question(shared: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Meaning representations come in blocks of rows, one reference each."""
    with (shared / "text" / "e2e-nlg" / "testset_w_refs.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:40]
    few = tmp_path / "few.csv"
    with few.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["mr", "ref"])
        writer.writeheader()
        writer.writerows(rows)
    source = {"path": str(few), "template": {"prompt": "{{ mr }}", "completion": "{{ ref }}"}}
    data = {"train": [{"path": "none.jsonl"}], "max_length": 512}
    recipe = recipe_of({"name_or_path": str(tiny_model)}, data=data, evaluation={"max_new_tokens": 2})
    suite = opened(recipe, suite="generate", data=[source], metrics=["bleu", "rougeL"])
    answers = answers_of(suite, base_of(recipe))
    asked: dict[str, list[str]] = {}
    for row in rows:
        asked.setdefault(row["mr"], []).append(row["ref"])
    assert [answer["references"] for answer in answers] == list(asked.values())
    assert max(map(len, asked.values())) > 1
    assert figures(suite, [{**answer, "generated": answer["references"][-1]} for answer in answers]) == pytest.approx(
        {"bleu": 100.0, "rougeL": 1.0}
    )


def test_a_pattern_is_a_metric(tiny_model: Path, tmp_path: Path) -> None:
    recipe = asking(tiny_model)
    source = write(tmp_path / "rows.jsonl", pairs(2))
    suite = opened(recipe, suite="generate", data=[source], metrics=["regex", "exact_match"], pattern=r"is (\w+ \d)")
    answers = [
        {"generated": "it is batman 0, no?", "references": ["batman 0"]},
        {"generated": "x", "references": ["x"]},
    ]
    assert figures(suite, answers) == {"regex": 0.5, "exact_match": 0.5}
    with pytest.raises(UserError, match=r"'\(' is no regular expression"):
        opened(recipe, suite="generate", data=[source], metrics=["regex"], pattern="(")


def test_texts_ask_nothing(tiny_model: Path, tmp_path: Path) -> None:
    recipe = asking(tiny_model)
    with pytest.raises(UserError, match=r"suites: generate: its rows are plain text: nothing is asked\. Use the suite"):
        opened(recipe, suite="generate", data=[write(tmp_path / "rows.jsonl", [{"text": "a b"}])])
    with pytest.raises(UserError, match=r"suites: generate: no rows\."):
        opened(recipe, suite="generate")


def test_answers_depend_on_rows_and_decoding(tiny_model: Path, tmp_path: Path) -> None:
    source, other = (write(tmp_path / f"{number}.jsonl", pairs(number)) for number in (3, 4))

    def digest(source: dict[str, Any], **evaluation: Any) -> str:
        return opened(asking(tiny_model, **evaluation), suite="generate", data=[source]).digest

    digests = [digest(source), digest(other), digest(source, max_new_tokens=7), digest(source, num_beams=2)]
    assert len(set(digests)) == 4
    assert digest(source, batch_size=3) == digests[0]


# ── classes and numbers ──────────────────────────────────────────────────────────────────────────────────────────────

LABELS = ["no", "perhaps", "yes"]


def classifying(model: Path, **model_keys: Any) -> Recipe:
    keys = {"name_or_path": str(model), "task": "sequence_classification", **model_keys}
    data = {"train": [{"path": "none.jsonl"}], "max_length": 64}
    return recipe_of(keys, data=data, evaluation={"batch_size": 4})


def labelled(number: int, divisor: int = 1) -> list[dict[str, Any]]:
    return [
        {"text": f"row {index * 7919 % 101} " * (index % 4 + 1), "label": index % 3 / divisor}
        for index in range(number)
    ]


@pytest.mark.parametrize("name", ["bert", "roberta", "llama"])
def test_classes_are_transformers_own_for_every_batch_size(
    name: str, architecture: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = [{**row, "label": int(row["label"])} for row in labelled(11)]
    source = write(tmp_path / "rows.jsonl", rows)
    recipe = classifying(architecture(name), labels=LABELS)
    base = base_of(recipe)
    suite = opened(recipe, suite="classify", data=[source], metrics=["accuracy", "macro_f1", "matthews"])
    answers = answers_of(suite, base)
    one_by_one = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"batch_size": 1})})
    alone = answers_of(opened(one_by_one, suite="classify", data=[source]), base)
    examples = context(recipe).rows([Source.model_validate(source)]).rows
    for answer, single, example, row in zip(answers, alone, examples, rows, strict=True):
        with torch.no_grad():
            logits = base.model(torch.tensor([example.input_ids])).logits[0].tolist()
        assert answer["logits"] == pytest.approx(logits, abs=1e-5) == single["logits"]
        assert answer["prediction"] == logits.index(max(logits)) == single["prediction"]
        assert (answer["label"], answer["expected"]) == (row["label"], LABELS[row["label"]])
        assert answer["predicted"] == LABELS[answer["prediction"]]
    right = sum(answer["prediction"] == answer["label"] for answer in answers) / 11
    assert figures(suite, answers)["accuracy"] == right


def test_numbers_have_correlations(architecture: Callable[[str], Path], tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", labelled(9, 2))
    recipe = classifying(architecture("bert"), num_labels=1)
    suite = opened(recipe, suite="classify", data=[source])
    answers = answers_of(suite, base_of(recipe))
    assert [answer["label"] for answer in answers] == [row["label"] for row in labelled(9, 2)]
    assert set(figures(suite, answers)) == {"pearson", "spearman"}
    exact = [{**answer, "prediction": 2 * answer["label"] + 1} for answer in answers]
    assert figures(suite, exact) == pytest.approx({"pearson": 1.0, "spearman": 1.0})


def test_other_labels_are_other_rows(architecture: Callable[[str], Path], tmp_path: Path) -> None:
    """The answers on disk hold the labels."""
    recipe = classifying(architecture("bert"), labels=LABELS)
    digests = set()
    for label in (1, 2):
        source = write(tmp_path / f"{label}.jsonl", [{"text": "a", "label": label}])
        digests.add(opened(recipe, suite="classify", data=[source]).digest)
    assert len(digests) == 2


def test_a_limit_and_no_rows(architecture: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = classifying(architecture("bert"), labels=LABELS)
    source = write(tmp_path / "rows.jsonl", [{"text": "a", "label": 1}] * 5)
    assert opened(recipe, suite="classify", data=[source], limit=2).num_rows == 2
    with pytest.raises(UserError, match=r"suites: classify: no rows\."):
        opened(recipe, suite="classify")
