"""What a recipe names: on this machine or elsewhere? If nothing is elsewhere, no socket is opened."""

from __future__ import annotations

import glob
import os
import re
from typing import Any

from qlora_cli.recipe.schema import Recipe, Source

LOCAL_TRACKERS = ("tensorboard",)

_FILE = re.compile(r"[./~].*|.*\.[A-Za-z]\w{0,7}")  # rows.jsonl is one, owner/corpus-v1.0 is not: as in data/sources.py

_LOCAL_ROWS = re.compile(r"^dataset_path:\s*['\"]?(json|csv|text|parquet|arrow)\b", re.MULTILINE)
"""Readers of files, as `datasets` names them, in the file of a task of lm-evaluation-harness."""


def is_local(path: str) -> bool:
    """Whether a path means something on this machine: it is there, or it has the form of a file or a pattern."""
    return os.path.lexists(path) or glob.has_magic(path) or bool(_FILE.fullmatch(path))


def is_task_path(task: str) -> bool:
    """Whether a task of the suite lm_eval is a YAML file, or a folder of such: no name of the harness has a slash."""
    return task.startswith((".", "~")) or "/" in task or task.endswith((".yaml", ".yml"))


def names_something_remote(recipe: Recipe) -> bool:
    """Whether the model, rows, a task or a tracker may need the network: what is not found here may be on a hub."""
    tasks = [task for suite in recipe.evaluation.suites for task in suite.tasks]
    remote = [not is_local(source.path) for source in _sources(recipe)]
    remote += [not is_task_path(task) or _names_hub_data(task) for task in tasks]
    remote.append(not os.path.exists(recipe.model.name_or_path))
    return any(remote) or any(tracker not in LOCAL_TRACKERS for tracker in recipe.report_to)


def _sources(recipe: Recipe) -> list[Source]:
    """All that rows are read from, for training and for measuring."""
    suites = [source for suite in recipe.evaluation.suites for source in suite.data]
    return [*recipe.data.train, *recipe.data.eval, *suites]


def _names_hub_data(task: str) -> bool:
    """Whether a file of a task, or one in the folder, does not say that its rows are in files of this machine."""
    path = os.path.expanduser(task)
    pattern = os.path.join(glob.escape(path), "**", "*.yaml") if os.path.isdir(path) else glob.escape(path)
    files = glob.glob(pattern, recursive=True)
    for file in filter(os.path.isfile, files):
        with open(file, encoding="utf-8", errors="replace") as text:
            said = text.read()
        if not _LOCAL_ROWS.search(said) or "://" in said:
            return True
    return False


def whole(path: str) -> str:
    """The path from the root on. Not abspath: that takes link/.. for the folder that link is in."""
    return os.path.join(os.getcwd(), os.path.expanduser(path).removeprefix("./"))


def with_whole_paths(recipe: Recipe) -> Recipe:
    """The recipe with every local path whole, so that its run is found from any folder."""
    values: dict[str, Any] = recipe.model_dump(by_alias=True)
    places = [(values["model"], "name_or_path"), (values["adapter"], "from"), (values["data"], "chat_template")]
    for holder, name in places:
        if holder[name] is not None and os.path.lexists(os.path.expanduser(holder[name])):
            holder[name] = whole(holder[name])
    suites = values["evaluation"]["suites"]
    for suite in suites:
        suite["tasks"] = [whole(task) if is_task_path(task) else task for task in suite["tasks"]]
        suite["shots_from"] = suite["shots_from"] and whole(suite["shots_from"])
    rows = [source for suite in suites for source in suite["data"]]
    for source in [*values["data"]["train"], *values["data"]["eval"], *rows]:
        if is_local(source["path"]):
            source["path"] = whole(source["path"])
    return Recipe.model_validate(values, by_alias=True, by_name=False)
