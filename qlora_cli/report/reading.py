"""What lies in a run folder, finished, running or killed: read only, never locked, and nothing of torch is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.errors import UserError
from qlora_cli.recipe.located_yaml import read_yaml

SHOWN_SAMPLES = 4
"""Answers that are shown of each suite."""

LEAST, LARGEST = 1e-300, 1e300
"""Between them is the size of every number but 0 that is shown: what is reckoned with them has room for a while."""

LAST_STEP = 1e15
"""No run is that long."""

MOST_LEVELS = 50
"""Of objects in objects, which would exhaust the stack when they are shown."""


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
        recipe, _ = read_yaml(resolved)
    except UserError as error:
        raise UserError(resolved, f"no recipe: {error.what}", "train again: it is written anew") from None
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
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path} could not be read: {error}")
        return None
    if not isinstance(found, dict) or is_deep(found):
        notes.append(f"{path} could not be read: it holds no JSON object of ours")
        return None
    return found


def is_deep(found: Any) -> bool:
    """Whether something is nested in more than MOST_LEVELS levels."""
    level = [found]
    for _ in range(MOST_LEVELS):
        insides = [
            list(one.values()) if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)
        ]
        level = [one for inside in insides for one in inside]
    return bool(level)


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
        if isinstance(found, dict) and not is_deep(found):
            yield found
        else:
            torn += 1
    if torn:
        notes.append(f"{path}: {torn} line{'s' if torn > 1 else ''} could not be read")


def metrics_of(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl with a step, their numbers as they are; where a step is there twice, the later one."""
    found: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in objects_in(path, notes):
        step = number(line.get("step"))
        if step is not None and 0 <= step <= LAST_STEP:
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
    there = {path.name: path for path in place.parent.glob("*.jsonl")}  # a model's name may be no file's name
    for name in suite["models"]:
        path = there.get(f"{place.name}.{name}.jsonl")
        lines = objects_in(path, notes) if path else ()
        given = [line for line in lines if isinstance(line.get("generated"), str)]
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
    """A number whose size is 0 or from LEAST to LARGEST, or None for whatever else a file may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if value == 0 or LEAST <= abs(value) <= LARGEST else None


def section(found: dict[str, Any], name: str) -> dict[str, Any]:
    """An object in an object; empty where none is there, or something else."""
    inside = found.get(name)
    return inside if isinstance(inside, dict) else {}


def listed(found: dict[str, Any], name: str) -> list[Any]:
    """A list in an object; empty where none is there, or something else."""
    inside = found.get(name)
    return inside if isinstance(inside, list) else []
