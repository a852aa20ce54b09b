"""What a recipe names on this machine, and what elsewhere: rows and tasks of suites count as training's do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.recipe import Recipe
from qlora_cli.recipe.remote import is_task_path, names_something_remote, with_whole_paths


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, rows and tasks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("model", "tasks", "mixed", "home"):
        (tmp_path / folder).mkdir()
    (tmp_path / "tasks/local.yaml").write_text("task: local\ndataset_path: json\n")
    (tmp_path / "mixed/local.yaml").write_text("task: local\ndataset_path: 'csv'\n")
    (tmp_path / "mixed/hub.yaml").write_text("task: hub\ndataset_path: allenai/ai2_arc\n")
    (tmp_path / "web.yaml").write_text("task: web\ndataset_path: json\ndataset_kwargs: {data_files: https://x.org/r}\n")
    return tmp_path


def recipe_of(*suites: dict[str, Any], **sections: Any) -> Recipe:
    rows = {"train": [{"path": "rows.jsonl"}]}
    return Recipe.model_validate(
        {"model": {"name_or_path": "model"}, "data": rows, "evaluation": {"suites": list(suites)}, **sections}
    )


def lm_eval(*tasks: str) -> dict[str, Any]:
    return {"suite": "lm_eval", "tasks": list(tasks)}


@pytest.mark.parametrize(
    "suite",
    [
        {"suite": "loss"},
        {"suite": "loss", "data": [{"path": "texts.txt"}]},
        {"suite": "choice", "data": [{"path": "a.jsonl"}], "shots": 2, "shots_from": "b.jsonl"},
        lm_eval("tasks/local.yaml"),
        lm_eval("./tasks", "tasks/none.yaml"),
    ],
)
def test_files_keep_the_network_closed(suite: dict[str, Any]) -> None:
    assert not names_something_remote(recipe_of(suite))


@pytest.mark.parametrize(
    "suite",
    [
        {"suite": "loss", "data": [{"path": "owner/corpus"}]},
        lm_eval("arc_easy"),
        lm_eval("tasks/local.yaml", "tasks"),  # a name without a slash is no folder
        lm_eval("./mixed"),
        lm_eval("web.yaml"),
    ],
)
def test_what_may_be_on_a_hub_opens_it(suite: dict[str, Any]) -> None:
    assert names_something_remote(recipe_of(suite))


def test_training_s_own_names_count_as_before() -> None:
    assert names_something_remote(recipe_of(model={"name_or_path": "owner/model"}))
    assert names_something_remote(recipe_of(report_to=["wandb"]))
    assert names_something_remote(recipe_of(data={"train": [{"path": "r.jsonl"}], "eval": [{"path": "owner/rows"}]}))


@pytest.mark.parametrize(
    ("task", "wanted"),
    [
        ("arc_easy", False),
        ("longproc_html_to_tsv_0.5k", False),
        ("mine.yaml", True),
        ("tasks/", True),
        ("./tasks", True),
        ("~/t.yml", True),
    ],
)
def test_a_task_is_a_path_by_its_form(task: str, wanted: bool) -> None:
    assert is_task_path(task) is wanted


def test_paths_of_suites_are_whole(here: Path) -> None:
    (here / "home/shots.jsonl").touch()
    recipe = with_whole_paths(
        recipe_of(
            {"suite": "loss", "data": [{"path": "a/*.txt"}, {"path": "owner/corpus"}]},
            {"suite": "choice", "data": [{"path": "./c.jsonl"}], "shots": 1, "shots_from": "~/shots.jsonl"},
            lm_eval("arc_easy", "./tasks", "tasks/local.yaml", "~/mine.yaml"),
        )
    )
    loss, choice, tasks = recipe.evaluation.suites
    assert [source.path for source in loss.data] == [f"{here}/a/*.txt", "owner/corpus"]
    assert ([source.path for source in choice.data], choice.shots_from) == (
        [f"{here}/c.jsonl"],
        f"{here}/home/shots.jsonl",
    )
    assert tasks.tasks == ["arc_easy", f"{here}/tasks", f"{here}/tasks/local.yaml", f"{here}/home/mine.yaml"]
    assert with_whole_paths(recipe) == recipe
    assert loss.shots_from is None
    os.chdir("/")
    assert with_whole_paths(recipe) == recipe, "from any folder"
