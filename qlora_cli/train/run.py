"""The run folder: who owns it, which recipe it belongs to, what was measured."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from qlora_cli.errors import Exit, UserError
from qlora_cli.model.source import read_json
from qlora_cli.model.whole_folder import replace_text
from qlora_cli.recipe import Recipe, dump_recipe
from qlora_cli.train.checkpoint import checkpoints

MAY_CHANGE = (
    "output_dir",
    "report_to",
    "evaluation",
    "data.eval",
    "training.logging_steps",
    "training.eval_steps",
    "training.save_steps",
    "training.save_total_limit",
    "training.gradient_checkpointing",
    "training.memory",
)
"""Keys that may differ when a run is continued: they do not touch what is learned."""


TRAINED_ON = {
    "base": "the base model",
    "tokenizer": "the tokenizer",
    "chat_template": "the chat template",
    "data": "the training data",
}
"""Fingerprints in run.json that a continued run must share, and what they are of."""


@dataclass(frozen=True)
class Run:
    """A run folder and the places in it."""

    folder: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def base(self) -> Path:
        """Holds the base, named by its content, where the adapter's start changed it."""
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def evaluations(self) -> Path:
        """Holds the figures of every suite, and every answer."""
        return self.folder / "eval"

    @property
    def best(self) -> Path:
        """The adapter of the best evaluation so far, where evaluation.best_metric names one."""
        return self.folder / "best"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def resolved(self) -> Path:
        return self.folder / "resolved.yaml"

    @property
    def facts(self) -> Path:
        return self.folder / "run.json"


@contextmanager
def locked(folder: Path) -> Iterator[Run]:
    """Owns the run folder, made where it is missing, until the block ends or the process dies.

    Raises UserError with exit 5 where another process owns it, and where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"output_dir: {folder}", f"cannot be written: {error.strerror}", "choose another output_dir", Exit.FAILED
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"output_dir: {folder}",
                "another qlora process works in it",
                "wait for it to end, or choose another output_dir",
                Exit.IN_USE,
            ) from None
        yield Run(folder)
    finally:
        os.close(descriptor)


def claim(run: Run, recipe: Recipe, recipe_text: bytes) -> None:
    """Writes the recipe into a new run folder, or makes sure that the folder holds this very run.

    Raises UserError where it holds another run, naming the keys that differ, or files that are no run's.
    """
    resolved = dump_recipe(recipe)
    if run.resolved.exists():
        different = differences(read_resolved(run), yaml.safe_load(resolved))
        if different and has_progress(run):  # else nothing was trained there: a first attempt that failed
            raise UserError(
                f"output_dir: {run.folder}",
                f"holds another run: {'; '.join(different[:5])}",
                "choose another output_dir, or give the recipe back its old values to continue that run",
            )
    else:
        strangers = sorted(path.name for path in run.folder.iterdir() if path.name not in ("run.lock", "eval"))
        if strangers:
            raise UserError(
                f"output_dir: {run.folder}",
                f"is no run folder and not empty ({', '.join(strangers[:3])})",
                "choose another output_dir",
            )
    (run.folder / "recipe.yaml").write_bytes(recipe_text)
    replace_text(run.resolved, resolved)


def read_resolved(run: Run) -> dict[str, Any]:
    """resolved.yaml as plain values. Raises UserError where it is damaged."""
    todo = "restore the file, or choose another output_dir"
    try:
        values = yaml.safe_load(run.resolved.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(run.resolved, f"damaged: {' '.join(str(error).split())[:200]}", todo) from error
    if not isinstance(values, dict):
        raise UserError(run.resolved, "damaged: it holds no recipe", todo)
    return values


def has_progress(run: Run) -> bool:
    """Whether anything trained lies in the run folder."""
    return bool(checkpoints(run.checkpoints)) or run.adapter.exists()


def differences(before: Any, now: Any, place: str = "") -> list[str]:
    """The keys in which two resolved recipes differ, but for those that may: 'training.seed: 1 there, 2 here'."""
    if place in MAY_CHANGE or before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        return [
            line for key in keys for line in differences(before.get(key), now.get(key), f"{place}.{key}".lstrip("."))
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return [line for at, pair in pairs for line in differences(*pair, f"{place}[{at}]")]
    return [f"{place} is {json.dumps(before, default=str)} there, {json.dumps(now, default=str)} here"]


def check_resume(run: Run, resume: str) -> None:
    """Checks `--resume` before anything is loaded: never starts anew and refuses a folder that has progress."""
    if resume not in ("auto", "never") and not (Path(resume) / "manifest.json").is_file():
        raise UserError(
            f"--resume {resume}",
            "no checkpoint there (no manifest.json)",
            "give auto, never or a checkpoints/step-NNNNNN",
        )
    if resume == "never" and has_progress(run):
        raise UserError(
            f"output_dir: {run.folder}",
            "holds the progress of an earlier run, which --resume never would lose",
            "choose another output_dir, or leave --resume out to continue",
        )


def read_facts(run: Run) -> dict[str, Any] | None:
    """run.json, or None where the run has none yet. Raises UserError where it is damaged."""
    return read_json(run.facts, "it says what was trained") if run.facts.exists() else None


def date_of(run: Run) -> date:
    """The day the run began, which a chat template that prints the date gets ever after; today for a new run."""
    facts = read_facts(run)
    if not facts or "date" not in facts:
        return date.today()
    try:
        return date.fromisoformat(facts["date"])
    except (ValueError, TypeError) as error:
        raise UserError(run.facts, f"date is {facts['date']!r}, no day", "write it as YYYY-MM-DD") from error


def write_facts(run: Run, facts: dict[str, Any]) -> None:
    """Writes run.json. What was trained on may not change under a continued run: base, template, tokens.

    Raises UserError where the base or the data is no longer what the run began with.
    """
    if before := read_facts(run):
        for name, what in TRAINED_ON.items():
            if before["fingerprints"][name] != facts["fingerprints"][name] and checkpoints(run.checkpoints):
                raise UserError(
                    run.facts,
                    f"{what} has changed since this run began, so continuing would mix two runs",
                    "bring the old one back, or choose another output_dir",
                )
    replace_text(run.facts, json.dumps(facts, indent=1))


def metrics_until(run: Run, step: int) -> None:
    """Drops the metrics after `step`: a killed run measured them, and its continuation measures them again."""
    if run.metrics.exists():
        kept = [line for line in run.metrics.read_text().splitlines() if _step_of(line) <= step]
        replace_text(run.metrics, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line torn by a crash


def append_metrics(run: Run, values: dict[str, Any]) -> None:
    """One more line of metrics.jsonl."""
    with run.metrics.open("a") as file:
        file.write(json.dumps(values) + "\n")
