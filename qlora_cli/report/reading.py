"""What lies in a run folder, finished, running or killed: read only, never locked, and nothing of torch is needed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qlora_cli.errors import UserError

SHOWN_SAMPLES = 4
"""Answers that are shown of each suite."""


@dataclass(frozen=True)
class Sample:
    """A row of a suite that generates, with the answer of every model by name."""

    suite: str
    where: str
    prompt: str
    references: list[str]
    answers: dict[str, str]


@dataclass(frozen=True)
class RunFiles:
    """A run as its files tell it.

    steps, evaluations: the lines of metrics.jsonl, of training and of evaluations in it.
    suites: what `qlora eval` stored, by the place in eval/. merge: merged/merge.json. notes: what could not be read.
    """

    folder: Path
    recipe: dict[str, Any]
    facts: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    suites: dict[str, dict[str, Any]]
    samples: list[Sample]
    merge: dict[str, Any] | None
    finished: bool
    notes: list[str]

    @property
    def last_step(self) -> int:
        """The last optimizer step that was logged; 0: none was."""
        return int(max((line["step"] for line in (*self.steps, *self.evaluations)), default=0))


def read_run(folder: Path) -> RunFiles:
    """Reads a run folder. Raises UserError where it is none; what is torn or damaged in it is left out and noted."""
    resolved = folder / "resolved.yaml"
    if not resolved.is_file():
        raise UserError(folder, "no run folder (no resolved.yaml)", "name the output_dir of a run")
    try:
        recipe = yaml.safe_load(resolved.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(
            resolved, f"no recipe: {str(error).splitlines()[0]}", "train again: it is written anew"
        ) from None
    if not isinstance(recipe, dict):
        raise UserError(resolved, "no recipe", "train again: it is written anew")
    notes: list[str] = []
    lines = [*metrics_of(folder / "metrics.jsonl", notes)]
    suites = dict(suites_of(folder / "eval", notes))
    return RunFiles(
        folder=folder,
        recipe=recipe,
        facts=read_object(folder / "run.json", notes) or {},
        steps=[line for line in lines if "loss" in line],
        evaluations=[line for line in lines if "loss" not in line],
        suites=suites,
        samples=[one for place, suite in suites.items() for one in samples_of(folder / "eval" / place, suite, notes)],
        merge=read_object(folder / "merged" / "merge.json", notes),
        finished=(folder / "adapter").is_dir(),
        notes=notes,
    )


def read_object(path: Path, notes: list[str]) -> dict[str, Any] | None:
    """A file with one JSON object, or None where it is not there, or is no such thing, which is noted."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        notes.append(f"{path} could not be read: {error}")
        return None
    if not isinstance(found, dict):
        notes.append(f"{path} could not be read: it holds no JSON object")
        return None
    return found


def objects_in(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines; lines that are none, such as one torn by a crash, are counted in a note."""
    if not path.is_file():
        return
    torn = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict):
            yield found
        else:
            torn += 1
    if torn:
        notes.append(f"{path}: {torn} line{'s' if torn > 1 else ''} could not be read")


def metrics_of(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl with a step, their numbers as they are; where a step is there twice, the later one."""
    found: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in objects_in(path, notes):
        step = line.get("step")
        if isinstance(step, int | float) and math.isfinite(step):
            found[int(step), "loss" in line] = line
    yield from (found[key] for key in sorted(found))


def suites_of(folder: Path, notes: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Figures of every suite under their place in eval/, those over first rows only behind the others."""
    for path in [*sorted(folder.glob("*.json")), *sorted(folder.glob("first-*/*.json"))]:
        found = read_object(path, notes)
        if found is not None and isinstance(found.get("models"), dict):
            yield path.relative_to(folder).as_posix().removesuffix(".json"), found


def samples_of(place: Path, suite: dict[str, Any], notes: list[str]) -> list[Sample]:
    """The first rows that all models have answered in words. place: of the suite, without an ending."""
    answers: dict[str, dict[int, dict[str, Any]]] = {}
    for name in suite["models"]:
        path = place.with_name(f"{place.name}.{name}.jsonl")
        given = [line for line in objects_in(path, notes) if isinstance(line.get("generated"), str)]
        if given:
            answers[name] = {line["row"]: line for line in given if isinstance(line.get("row"), int)}
    if not answers:
        return []
    shared = set.intersection(*(set(rows) for rows in answers.values()))
    found = []
    for row in sorted(shared)[:SHOWN_SAMPLES]:
        first = next(iter(answers.values()))[row]
        references = first.get("references")
        expected = [str(one) for one in references] if isinstance(references, list) else []
        told = {name: rows[row]["generated"] for name, rows in answers.items()}
        found.append(Sample(place.name, str(first.get("where", "")), str(first.get("prompt", "")), expected, told))
    return found


def number(value: Any) -> float | None:
    """A finite number, or None for whatever else a file may hold."""
    right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if right else None
