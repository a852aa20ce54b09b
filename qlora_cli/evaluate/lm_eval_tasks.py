"""Tasks of lm-evaluation-harness: found by name or file, with their rows read, and refused where they cannot be run."""

from __future__ import annotations

import difflib
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from qlora_cli.data.hub import HubData
from qlora_cli.data.lines import first_line
from qlora_cli.data.readers import DataFile
from qlora_cli.data.sources import Part
from qlora_cli.errors import Exit, UserError
from qlora_cli.evaluate.extra import library
from qlora_cli.model.base import quiet_loading
from qlora_cli.recipe.remote import is_task_path

SHOTS_SEED = 1234
"""Seed of the solved examples, numpy and torch: simple_evaluate's own default; that of `random` is 0."""


@dataclass(frozen=True)
class Tasks:
    """tasks: the harness's Task objects by name. groups: its Group objects by name, whose figures are over several."""

    tasks: dict[str, Any]
    groups: dict[str, Any]


def load_tasks(specs: Sequence[str], where: str) -> Tasks:
    """The tasks of names (a group or a tag names several), of YAML files, and of all files in a folder.

    Reads their data sets. The index of the harness's own 14,000 names takes ten seconds; files alone need none of it.
    Raises UserError for an unknown name, for what cannot be loaded, and for what the suite cannot run.
    """
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    manager = _manager(specs, where)
    for spec in [each for named in specs for each in _files_of(named, where)]:
        if not is_task_path(spec) and spec not in manager.task_index:
            near = difflib.get_close_matches(spec, manager.all_tasks, n=4)
            todo = f"choose from {', '.join(near)}" if near else "`lm-eval ls tasks` lists them all"
            raise UserError(where, f"lm-evaluation-harness has no task {spec!r}", f"{todo}, or name a YAML file")
        found = _loaded(manager, spec, where)
        if twice := sorted(tasks.keys() & found["tasks"].keys()):
            raise UserError(where, f"the task {twice[0]!r} is named twice", "name it once, or rename one of them")
        tasks |= found["tasks"]
        groups |= found.get("groups", {})
    for name, task in tasks.items():
        _refuse_task(name, task, where)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)  # as simple_evaluate does
    return Tasks(tasks, groups)


def _manager(specs: Sequence[str], where: str) -> Any:
    """The index of what is named: of the harness's own tasks where one is, or where a group's file has one of them."""
    files = [Path(file) for spec in specs if is_task_path(spec) for file in _files_of(spec, where)]
    groups = {file: members for file in files if isinstance(members := _config_of(file, where).get("task"), list)}
    folders = sorted({str(file.parent) for file in groups})
    index = library("lm_eval.tasks").TaskManager
    manager = index(include_defaults=False, include_path=folders or None)
    names = [spec for spec in specs if not is_task_path(spec)]
    names += [member for members in groups.values() for member in members if isinstance(member, str)]
    if all(name in manager.task_index for name in names):
        return manager
    return index(include_path=folders or None)


def _files_of(spec: str, where: str) -> list[str]:
    """A name as it is; a file; the YAML files of tasks and groups in a folder, by name."""
    if not is_task_path(spec):
        return [spec]
    path = Path(spec).expanduser()
    if not path.exists():
        raise UserError(where, f"{spec} is not there", "name a YAML file of a task, a folder of them, or a task")
    if path.is_file():
        return [str(path)]
    files = [str(file) for file in sorted(path.rglob("*.yaml")) if isinstance(_config_of(file, where).get("task"), str)]
    if not files:
        raise UserError(where, f"{spec} holds no task", "put *.yaml files with the key `task` there")
    return files


def _config_of(path: Path, where: str) -> dict[str, Any]:
    """What a file says, its includes among it: `task` is a name, or the members of a group; without it no task."""
    import yaml

    try:
        config = library("lm_eval.tasks._yaml_loader").load_yaml(path, resolve_func=False)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(where, f"{path} cannot be read: {first_line(error)}", "mend the file") from error
    return config if isinstance(config, dict) else {}


def _loaded(manager: Any, spec: str, where: str) -> dict[str, Any]:
    group = _config_of(Path(spec), where).get("group") if is_task_path(spec) else None
    try:
        found: dict[str, Any] = manager.load([group or spec])  # a group's file it only knows by name (0.4.13)
    except ConnectionError as error:
        what = f"the data set of {spec} is not on this machine: {first_line(error)}"
        raise UserError(where, what, "run where the hub is reached, once", Exit.ENVIRONMENT) from error
    except Exception as error:  # a task's file holds any Python it likes, and so its errors
        what = f"lm-evaluation-harness cannot load {spec}: {type(error).__name__}: {first_line(error)}"
        raise UserError(where, what, "check the file, its data set, and what else the task needs installed") from error
    return found


def _refuse_task(name: str, task: Any, where: str) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        todo = "run it in a sandbox with lm-evaluation-harness itself"
        raise UserError(where, f"the task {name} executes what the model writes", todo, Exit.REFUSED)
    if getattr(task, "MULTIMODAL", False):
        raise UserError(where, f"the task {name} has images or sound", "name tasks of text alone")


def parts_of(task: Any) -> list[Part]:
    """The files, or the split of the hub, whose rows a loaded task measures; its solved examples may be of others.

    None where a function of the task's own makes the rows (custom_dataset).
    """
    import datasets

    config, path = task.config, task.DATASET_PATH
    split = config.test_split or config.validation_split
    asked = config.dataset_kwargs or {}
    named = {key: asked[key] for key in ("data_files", "data_dir", "cache_dir", "revision") if asked.get(key)}
    if callable(config.custom_dataset) or path is None:
        return []
    if named.keys().isdisjoint(("data_files", "data_dir")) and not Path(path).exists():
        return [HubData(path, task.DATASET_NAME, split)] if split else []
    # finds the files again as the harness found them, and reads none
    files = datasets.load_dataset_builder(path, task.DATASET_NAME, **named).config.data_files or {}
    chosen = files[split] if split in files else [file for each in files.values() for file in each]
    return [DataFile(str(file)) for file in chosen]


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and log lines of the harness, of `datasets` and of transformers: ours tell how far it is."""
    import datasets

    tqdm = library("tqdm").tqdm

    def silent(*arguments: Any, **settings: Any) -> Any:
        return tqdm(*arguments, **{**settings, "disable": True})

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    with ExitStack() as stack:
        stack.enter_context(quiet_loading())
        for module in ("lm_eval.api.model", "lm_eval.api.task", "lm_eval.models.huggingface"):
            stack.enter_context(patch.object(library(module), "tqdm", silent))
        try:
            yield
        finally:
            logger.setLevel(level)
            if not bars:
                datasets.enable_progress_bars()


@contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """The random numbers that simple_evaluate begins with; those of a training run go on after as if nothing had been.

    Source: lm_eval/evaluator.py, simple_evaluate (v0.4.13).
    """
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        random.seed(0)
        np.random.seed(SHOTS_SEED)
        torch.manual_seed(SHOTS_SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
