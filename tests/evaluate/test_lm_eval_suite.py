"""The suite `lm_eval` gives lm-evaluation-harness's own figures, of the model in memory."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from qlora_cli.data.hub import HubData
from qlora_cli.data.readers import DataFile
from qlora_cli.data.sources import Part
from qlora_cli.errors import Exit, UserError
from qlora_cli.evaluate.lm_eval_suite import in_words, plain
from qlora_cli.evaluate.lm_eval_tasks import parts_of
from qlora_cli.evaluate.measuring import figures, result_of
from qlora_cli.model.base import Base
from qlora_cli.recipe import Recipe
from qlora_cli.train.suites import open_suites
from tests.evaluate.choices import continuations, questions
from tests.evaluate.opening import answers_of, base_of, context, opened, recipe_of, write

pytest.importorskip("lm_eval")


def metric(name: str, aggregation: str | None = None) -> dict[str, Any]:
    return {"metric": name} | ({"aggregation": aggregation, "higher_is_better": True} if aggregation else {})


FIRST = {"function": "take_first"}
TASKS: dict[str, dict[str, Any]] = {
    "asked": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "num_fewshot": 2,
        "fewshot_split": "test",
        "metric_list": [metric("acc", "mean"), metric("acc_norm", "mean")],
    },
    "two": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": "{{gold % 2}}",
        "metric_list": [metric(name) for name in ("acc", "f1", "mcc", "brier_score")] + [metric("acc_norm", "median")],
    },
    "continued": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation}}",
        "metric_list": [metric("perplexity"), metric("acc", "nanmean")],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{context}}",
        "metric_list": [metric("word_perplexity"), metric("byte_perplexity"), metric("bits_per_byte")],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{continuation}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        "metric_list": [metric("exact_match"), metric("bleu"), metric("chrf")],
        "filter_list": [
            {"name": "whole", "filter": [FIRST]},
            {
                "name": "words",
                "filter": [{"function": "regex", "regex_pattern": "([a-z]+)"}, {"function": "take_first"}],
            },
        ],
    },
}
"""One of each kind of output, and of each aggregation that the table has."""


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **changes: Any) -> str:
    data = write(folder / f"{name}.jsonl", rows)["path"]
    files = {"data_files": {"test": data}, "cache_dir": str(folder / "cache")}
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": files,
        "test_split": "test",
        **TASKS[name],
        **changes,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    return str(folder / f"{name}.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tasks above, and two groups: over rows, and over tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    for number, name in enumerate(TASKS):
        make = questions if name in ("asked", "two") else continuations
        write_task(folder, name, make(7 + 2 * number, seed=number))
    for name, by_rows in (("by_rows", True), ("by_tasks", False)):
        wanted = [{"metric": "acc", "aggregation": "mean", "weight_by_size": by_rows}]
        group = {"group": name, "task": ["asked", "two"], "aggregate_metric_list": wanted}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(group))
    return folder


@pytest.fixture(scope="module")
def recipe(tiny_model: Path) -> Recipe:
    return recipe_of({"name_or_path": str(tiny_model)}, evaluation={"batch_size": 3})


@pytest.fixture(scope="module")
def base(recipe: Recipe) -> Base:
    return base_of(recipe)


def harness(base: Base, specs: list[str], include: Path, limit: int | None = None) -> dict[str, dict[str, Any]]:
    """The results of the harness itself, as simple_evaluate comes to them."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_defaults=False, include_path=str(include)).load(specs)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    model = HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=1)
    found = evaluator.evaluate(model, loaded, limit=limit, bootstrap_iters=0)
    results: dict[str, dict[str, Any]] = found["results"]
    return results


def test_every_figure_is_the_harness_s_own(recipe: Recipe, base: Base, folder: Path) -> None:
    suite = opened(recipe, suite="lm_eval", tasks=[str(folder)])
    answers = answers_of(suite, base)
    found = figures(suite, answers)
    results = harness(base, list(TASKS), folder)
    wanted = {
        f"{task}.{key.removesuffix(',none')}": value
        for task, result in results.items()
        for key, value in result.items()
        if isinstance(value, float) and "_stderr" not in key
    }
    left_out = {"written.chrf,whole", "written.chrf,words"}
    assert set(found) == set(wanted) - left_out
    assert found == pytest.approx({name: wanted[name] for name in found}, rel=1e-5)
    assert len(found) == 16
    assert suite.notes(answers) == [
        f"in the answers, without a figure, as no mean of the rows: {', '.join(sorted(left_out))}"
    ]
    assert {answer["where"] for answer in answers if answer["group"] == "texts"} == {
        f"texts:{row}" for row in range(13)
    }


def test_figures_have_intervals_and_differences(recipe: Recipe, base: Base, folder: Path) -> None:
    suite = opened(recipe, suite="lm_eval", tasks=[str(folder / "two.yaml"), str(folder / "texts.yaml")])
    answers = answers_of(suite, base)
    result = result_of(suite, {"base": answers, "adapter": answers}, 20)
    for figure in result["models"]["base"].values():
        assert figure["low"] <= figure["value"] <= figure["high"]
    assert {each["value"] for each in result["differences"][0]["figures"].values()} == {0.0}


@pytest.mark.parametrize("group", ["by_rows", "by_tasks"])
def test_a_groups_figure_is_the_harness_s_over_rows_or_over_tasks(
    recipe: Recipe, base: Base, folder: Path, group: str
) -> None:
    suite = opened(recipe, suite="lm_eval", tasks=[str(folder / f"{group}.yaml")])
    found = figures(suite, answers_of(suite, base))
    wanted = harness(base, [group], folder)[group]["acc,none"]
    assert found[f"{group}.acc"] == pytest.approx(wanted, abs=1e-12)
    assert f"{group}.acc_norm" not in found, "the group does not ask for it"
    assert {"asked.acc", "two.acc"} < set(found)


@pytest.mark.parametrize("size", [1, 16])
def test_no_figure_changes_with_the_batch_size(recipe: Recipe, base: Base, folder: Path, size: int) -> None:
    other = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"batch_size": size})})
    names = [str(folder / f"{name}.yaml") for name in ("asked", "continued", "texts")]
    suites = [opened(one, suite="lm_eval", tasks=names) for one in (recipe, other)]
    found = [figures(suite, answers_of(suite, base)) for suite in suites]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_limit_is_one_of_each_task(recipe: Recipe, base: Base, folder: Path) -> None:
    names = [str(folder / f"{name}.yaml") for name in ("asked", "continued")]
    suite = opened(recipe, suite="lm_eval", tasks=names, limit=3)
    assert suite.num_rows == 6
    found = figures(suite, answers_of(suite, base))
    assert found["asked.acc"] == pytest.approx(harness(base, ["asked"], folder, limit=3)["asked"]["acc,none"])


def test_finished_tasks_are_not_asked_again(recipe: Recipe, base: Base, folder: Path, monkeypatch: Any) -> None:
    from qlora_cli.evaluate import lm_eval_suite

    names = [str(folder / f"{name}.yaml") for name in ("asked", "two", "texts")]
    suite = opened(recipe, suite="lm_eval", tasks=names, limit=4)
    whole = answers_of(suite, base)
    asked, ask = [], lm_eval_suite.ask

    def counted(name: str, *rest: Any) -> Any:
        asked.append(name)
        return ask(name, *rest)

    monkeypatch.setattr(lm_eval_suite, "ask", counted)
    rest = [6, 7, 10]  # two rows of the second task, one of the third
    assert answers_of(suite, base, rest) == [whole[row] for row in rest]
    assert asked == ["two", "texts"]


def test_what_answers_depend_on_is_in_the_digest(recipe: Recipe, tmp_path: Path) -> None:
    rows = questions(5)
    digests = [opened(recipe, suite="lm_eval", tasks=[write_task(tmp_path, "two", rows)]).digest for _ in range(2)]
    assert digests[0] == digests[1]
    (tmp_path / "a").mkdir()
    changed = [{**row, "query": row["query"] + "!"} for row in rows]
    other = opened(recipe, suite="lm_eval", tasks=[write_task(tmp_path / "a", "two", changed)])
    (tmp_path / "b").mkdir()
    prompt = opened(recipe, suite="lm_eval", tasks=[write_task(tmp_path / "b", "two", rows, doc_to_text="{{query}}?")])
    assert len({digests[0], other.digest, prompt.digest}) == 3


def test_a_function_within_the_settings_is_told_by_its_source(recipe: Recipe, tmp_path: Path) -> None:
    def digest(body: str) -> str:
        (tmp_path / "own.py").write_text(f"def shorten(resps, docs):\n    return {body}\n")
        sys.modules.pop(str(tmp_path / "own"), None)  # as another process has it
        kept.append(opened(recipe, suite="lm_eval", tasks=[str(path)]))
        return kept[-1].digest

    path = Path(write_task(tmp_path, "written", continuations(3)))
    config = yaml.safe_load(path.read_text()) | {"filter_list": [{"name": "own", "filter": "FILTERS"}]}
    steps = "[{function: custom, filter_fn: !function own.shorten}, {function: take_first}]"
    path.write_text(yaml.safe_dump(config).replace("FILTERS", steps))
    kept: list[Any] = []  # so that no function takes another's place in memory
    one, same = (digest("[[resp[:1] for resp in row] for row in resps]") for _ in range(2))
    assert one == same
    assert digest("[[resp[:2] for resp in row] for row in resps]") != one


def test_what_has_no_form_in_json_is_told_without_its_place_in_memory() -> None:
    class Bare:
        def __call__(self) -> None: ...

    for value in (
        Bare(),
        Bare,
        Bare().__call__,
        partial(len, [1]),
        partial(continuations, 3),
        len,
        object(),
        Path("x"),
    ):
        assert "0x" not in json.dumps(in_words(value), default=in_words)
    assert "def continuations" in json.dumps(in_words(partial(continuations, 3)))
    assert in_words(Path("x")) == "x"


def test_nothing_of_a_training_run_is_moved(recipe: Recipe, base: Base, folder: Path, capfd: Any) -> None:
    import copy

    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    tokenizer, config = copy.deepcopy(base.tokenizer.init_kwargs), base.model.generation_config
    suite = opened(recipe, suite="lm_eval", tasks=[str(folder / "written.yaml"), str(folder / "asked.yaml")])
    answers_of(suite, base)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert (base.tokenizer.init_kwargs, base.model.generation_config) == (tokenizer, config)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", ""), "the terminal is ours"


def test_adapters_are_measured_with_the_base_as_it_is(
    recipe: Recipe, base: Base, folder: Path, make_recipe: Any
) -> None:
    from qlora_cli.model.adapter import attach_adapter
    from tests.architectures import shift_adapter

    quantised = make_recipe()
    on_base = base_of(quantised)
    suite = opened(recipe, suite="lm_eval", tasks=[str(folder / "continued.yaml")])
    plain_figures = figures(suite, answers_of(suite, on_base))
    model = attach_adapter(on_base, quantised.adapter)
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shift_adapter(model)
    shifted = figures(suite, [answer for _, answer in sorted(suite.answer(on_base, model, range(suite.num_rows)))])
    assert shifted["continued.perplexity"] != pytest.approx(plain_figures["continued.perplexity"], rel=1e-3)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items() if "lora" not in name)


# ── what cannot be run ───────────────────────────────────────────────────────────────────────────────────────────────


def refused(recipe: Recipe, *tasks: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        opened(recipe, suite="lm_eval", tasks=[str(task) for task in tasks])
    assert caught.value.where == "evaluation.suites: lm_eval"
    return caught.value


def test_an_unknown_name_names_near_ones(recipe: Recipe, monkeypatch: Any) -> None:
    import lm_eval

    from qlora_cli.evaluate import lm_eval_tasks

    few = Path(lm_eval.__file__).parent / "tasks" / "arc"  # all 14,000 names take ten seconds
    manager = lm_eval_tasks.library("lm_eval.tasks").TaskManager(include_defaults=False, include_path=str(few))
    monkeypatch.setattr(lm_eval_tasks, "_manager", lambda specs, where: manager)
    assert str(refused(recipe, "arc_easi")).startswith(
        "evaluation.suites: lm_eval: lm-evaluation-harness has no task 'arc_easi'. Choose from arc_easy, "
    )


def test_a_data_set_that_is_not_here_is_told(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    remote = write_task(tmp_path, "two", questions(2), dataset_path="some-owner/some-rows", dataset_kwargs={})
    error = refused(recipe, remote)
    assert (error.code, "the data set of" in error.what) == (Exit.ENVIRONMENT, True)
    assert error.todo == "run where the hub is reached, once"


def test_files_that_are_no_tasks_are_told(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    assert "is not there" in str(refused(recipe, tmp_path / "none.yaml"))
    assert "holds no task" in str(refused(recipe, tmp_path))
    (tmp_path / "broken.yaml").write_text("task: [")
    assert "cannot be read" in str(refused(recipe, tmp_path / "broken.yaml"))
    odd = write_task(tmp_path, "two", questions(2), output_type="songs")
    assert "cannot load" in str(refused(recipe, odd))
    assert "output_type" in str(refused(recipe, odd))
    assert "is named twice" in str(refused(recipe, folder / "two.yaml", folder / "two.yaml"))


def trained_on(recipe: Recipe, trained: Sequence[Part], task: str) -> None:
    """The task opened where a run has read these."""
    suite = {"suite": "lm_eval", "tasks": [task], "name": "mine"}
    own = recipe_of(recipe.model.model_dump(), evaluation={"suites": [suite]})
    open_suites(replace(context(own), trained=trained))


@pytest.mark.parametrize("form", ["text", "list", "splits", "pattern", "folder", "data set"])
def test_what_was_trained_on_is_not_measured(recipe: Recipe, tmp_path: Path, monkeypatch: Any, form: str) -> None:
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = tmp_path / "rows"
    rows.mkdir()
    path, other = (write(rows / f"{name}.jsonl", questions(5, seed))["path"] for seed, name in enumerate(("lmt", "b")))
    forms: dict[str, dict[str, Any]] = {
        "text": {"dataset_kwargs": {"data_files": path}, "test_split": "train"},
        "list": {"dataset_kwargs": {"data_files": [other, path]}, "test_split": "train"},
        "splits": {"dataset_kwargs": {"data_files": {"train": other, "test": [path]}}},
        "pattern": {"dataset_kwargs": {"data_files": {"test": f"{rows}/l*.jsonl"}}},
        "folder": {"dataset_kwargs": {"data_dir": str(rows)}, "test_split": "train"},
        "data set": {"dataset_path": str(rows), "dataset_kwargs": None, "test_split": "train"},
    }
    task = write_task(tmp_path, "two", questions(3), **forms[form])
    (tmp_path / "link.jsonl").symlink_to(path)
    with pytest.raises(UserError) as caught:
        trained_on(recipe, [DataFile(str(tmp_path / "link.jsonl"))], task)
    assert caught.value.where == "evaluation.suites: mine"
    assert caught.value.what == f"{path} is held out and trained on"
    trained_on(recipe, [DataFile(str(tmp_path / "two.jsonl"))], task)


def test_solved_examples_may_have_been_trained_on(recipe: Recipe, tmp_path: Path) -> None:
    path, other = (write(tmp_path / f"{name}.jsonl", questions(5, seed))["path"] for seed, name in enumerate("ab"))
    files = {"data_files": {"train": path, "test": other}, "cache_dir": str(tmp_path / "cache")}
    shots = {"dataset_kwargs": files, "training_split": "train", "num_fewshot": 2, "fewshot_split": "train"}
    task = write_task(tmp_path, "two", questions(3), **shots)
    trained_on(recipe, [DataFile(path)], task)
    with pytest.raises(UserError, match="is held out and trained on"):
        trained_on(recipe, [DataFile(other)], task)


def test_a_split_of_the_hub_is_known_by_its_names() -> None:
    task = SimpleNamespace(
        DATASET_PATH="owner/rows",
        DATASET_NAME="main",
        config=SimpleNamespace(test_split=None, validation_split="dev", dataset_kwargs=None, custom_dataset=None),
    )
    assert parts_of(task) == [HubData("owner/rows", "main", "dev")]
    task.config.custom_dataset = len
    assert parts_of(task) == []


def test_without_the_extra_it_is_named(recipe: Recipe, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"lm_eval is not installed\. Run `pip install 'qlora\[eval\]'`") as caught:
        opened(recipe, suite="lm_eval", tasks=[str(folder / "two.yaml")])
    assert caught.value.code is Exit.ENVIRONMENT


def test_code_that_a_model_wrote_is_not_run(recipe: Recipe, tmp_path: Path) -> None:
    error = refused(recipe, write_task(tmp_path, "written", continuations(2), unsafe_code=True))
    assert (error.code, error.what) == (Exit.REFUSED, "the task written executes what the model writes")


def test_answers_are_what_json_can_say() -> None:
    value = {
        1: (np.float32(0.5), np.arange(2), float("nan"), -float("inf")),
        "of": Path("x"),
        "no": None,
        "b": np.True_,
    }
    found = plain(value)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found == {"1": [0.5, [0, 1], None, None], "of": "x", "no": None, "b": True}
