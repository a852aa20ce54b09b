"""Suites over models: every answer on disk as it is given, then figures with intervals, side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from qlora_cli.errors import UserError
from qlora_cli.evaluate.answers import Key, appended, line_of, read_answers
from qlora_cli.evaluate.bootstrap import interval, paired_difference
from qlora_cli.evaluate.suite import Answer, Measure, Opened
from qlora_cli.model.base import Base
from qlora_cli.model.whole_folder import replace_text

Answers = list[Answer]


@dataclass(frozen=True)
class Subject:
    """A model that is measured. name: base, start, adapter or merged. digest: of all that it computes with."""

    name: str
    base: Base
    model: Any
    digest: str


def answered(
    suite: Opened, subject: Subject, folder: Path, again: bool, progress: Callable[[int], None] = lambda done: None
) -> Answers:
    """The subject's answers to all rows of the suite, in their order; those on disk are not given again.

    folder: holds NAME.SUBJECT.jsonl. again: answers of another model or other rows are replaced, else refused.
    """
    path = folder / f"{suite.name}.{subject.name}.jsonl"
    key: Key = {"rows": suite.digest, "model": subject.digest}
    if again:
        path.unlink(missing_ok=True)
    answers, whole_bytes = read_answers(path, key)
    todo = [row for row in range(suite.num_rows) if row not in answers]
    progress(len(answers))
    if todo:
        with appended(path, key, whole_bytes) as file:
            for row, answer in given(suite, subject, todo):
                answers[row] = answer
                file.write(line_of(row, answer))
                file.flush()
                progress(len(answers))
    return [answers[row] for row in range(suite.num_rows)]


def refuse_other_rows(suite: Opened, folder: Path) -> None:
    """Raises UserError, before a model is loaded, where answers of the suite on disk are of other rows or settings."""
    for path in sorted(folder.glob(f"{suite.name}.*.jsonl")):
        read_answers(path, {"rows": suite.digest})


def known_answers(suite: Opened, subject: str, digest: str, folder: Path) -> Answers | None:
    """The answers of a model that were given before, where all of them are there and are of this very model."""
    try:
        answers, _ = read_answers(folder / f"{suite.name}.{subject}.jsonl", {"rows": suite.digest, "model": digest})
    except UserError:  # of something else
        return None
    return [answers[row] for row in range(suite.num_rows)] if len(answers) == suite.num_rows else None


def given(suite: Opened, subject: Subject, todo: Sequence[int]) -> Any:
    """The subject's answers to these rows, in evaluation mode; the mode is restored after."""
    training = subject.model.training
    subject.model.eval()
    try:
        yield from suite.answer(subject.base, subject.model, todo)
    finally:
        subject.model.train(training)


def figures(suite: Opened, answers: Answers) -> dict[str, float]:
    """The figures of the answers, by name, without intervals."""
    return {name: measure.figure(measure.rows(answers)) for name, measure in suite.measures.items()}


def result_of(suite: Opened, found: Mapping[str, Answers], resamples: int) -> dict[str, Any]:
    """The figures of every model with their intervals, and what each has more than the one before it.

    found: the answers by model, in the order of the columns. resamples: of the bootstrap; 0: no intervals.
    """
    told: dict[str, Any] = {"suite": suite.kind, "name": suite.name, "rows": suite.num_rows, "models": {}}
    told["differences"], told["groups"], told["notes"] = [], {}, []
    names = list(found)
    for name in names:
        told["models"][name] = {
            label: _estimate(measure, found[name], resamples) for label, measure in suite.measures.items()
        }
        told["notes"] += [f"{name}: {note}" for note in suite.notes(found[name])]
        told["groups"][name] = _of_groups(suite, found[name])
    for before, after in pairwise(names):
        differences = {
            label: _difference(measure, found[after], found[before], resamples)
            for label, measure in suite.measures.items()
        }
        told["differences"].append({"of": after, "to": before, "figures": differences})
    return told


def store_result(suite: Opened, result: dict[str, Any], folder: Path) -> None:
    """Writes NAME.json, which is at every moment the old one or the new one."""
    replace_text(folder / f"{suite.name}.json", json.dumps(result, indent=1) + "\n")


def _estimate(measure: Measure, answers: Answers, resamples: int) -> dict[str, float | None]:
    rows = measure.rows(answers)
    found: dict[str, float | None] = {"value": finite(measure.figure(rows))}
    if resamples:
        low, high = interval(measure.figure, rows, resamples=resamples)
        found |= {"low": finite(low), "high": finite(high)}
    return found


def _difference(measure: Measure, after: Answers, before: Answers, resamples: int) -> dict[str, float | None]:
    rows = measure.rows(after), measure.rows(before)
    if not resamples:
        return {"value": finite(measure.figure(rows[0]) - measure.figure(rows[1]))}
    value, low, high = paired_difference(measure.figure, *rows, resamples=resamples)
    return {"value": finite(value), "low": finite(low), "high": finite(high)}


def _of_groups(suite: Opened, answers: Answers) -> dict[str, dict[str, Any]]:
    """The figures of each group of rows, where the suite has any; without intervals, for the groups are small."""
    groups: dict[str, Answers] = {}
    for answer in answers:
        groups.setdefault(suite.group(answer), []).append(answer)
    if set(groups) <= {""}:
        return {}
    return {
        name: {"rows": len(rows), **{label: finite(value) for label, value in figures(suite, rows).items()}}
        for name, rows in sorted(groups.items())
    }


def finite(value: float) -> float | None:
    """The number, None where it is infinite or none: JSON has no word for these."""
    return value if math.isfinite(value) else None
