"""The suite `lm_eval`: tasks of lm-evaluation-harness, asked by the harness of the model that is loaded already.

No chat template is applied, seeds are the harness's own, and an answer is decoded as the task asks: greedily, unless it
says otherwise. Whole tasks are answered, one after the other: a run that is taken up begins with the first unfinished.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch

from qlora_cli.evaluate.extra import library
from qlora_cli.evaluate.lm_eval_figures import label_of, measures_of
from qlora_cli.evaluate.lm_eval_tasks import SHOTS_SEED, Tasks, load_tasks, parts_of, quiet, seeded
from qlora_cli.evaluate.suite import Answer, Context, Opened, name_of, no_rows
from qlora_cli.model.base import Base
from qlora_cli.recipe.schema import Suite


def open_lm_eval(suite: Suite, context: Context) -> Opened:
    """The tasks with their rows; a limit is one of each task's rows, as the harness's own is.

    Figures are TASK.METRIC, of a group GROUP.METRIC, and with an answer's filter TASK.METRIC,FILTER.
    """
    where = f"evaluation.suites: {name_of(suite)}"
    limit = context.limit_of(suite)
    counts, read = {}, {}
    with quiet(), seeded(torch.device("cpu")):
        tasks = load_tasks(suite.tasks, where)
        for name, task in tasks.tasks.items():
            counts[name], read[name] = _rows_of(task, limit)
    if not all(counts.values()):
        raise no_rows(suite)
    measures, left_out = measures_of(tasks)
    return Opened(
        name_of(suite),
        suite.suite,
        sum(counts.values()),
        {"suite": suite.suite, "version": library("lm_eval").__version__, "tasks": read},
        partial(_answer, tasks, counts, context.batch_size),
        measures,
        notes=partial(_notes, set(measures), left_out),
        measured=[part for task in tasks.tasks.values() for part in parts_of(task)],
    )


def _rows_of(task: Any, limit: int | None) -> tuple[int, str]:
    """The number of rows, and SHA-256 of these, of those that solved examples come from, and of the task's settings."""
    rows = task.eval_docs
    number = len(rows) if limit is None else min(limit, len(rows))
    told = [task.config.to_dict(keep_callable=True), list(islice(rows, number))]
    if task.get_config("num_fewshot"):
        told.append(list(task.fewshot_docs()))
    return number, hashlib.sha256(json.dumps(told, sort_keys=True, default=in_words).encode()).hexdigest()


def in_words(value: Any) -> Any:
    """What JSON has no form for, the same in every process: of a function its module, name and source."""
    if isinstance(value, partial):
        return [in_words(value.func), value.args, value.keywords]
    named = value if hasattr(value, "__qualname__") else type(value)
    if not callable(value) and named.__repr__ is not object.__repr__:
        return str(value)
    try:
        source = inspect.getsource(named)
    except (OSError, TypeError):  # written in C, or in no file
        source = ""
    return [named.__module__, named.__qualname__, source]


def _answer(
    tasks: Tasks, counts: dict[str, int], size: int, base: Base, model: Any, todo: Sequence[int]
) -> Iterator[tuple[int, Answer]]:
    wanted, first = set(todo), 0
    asked = harness_model(base, model, size)
    for name, count in counts.items():
        if not wanted.isdisjoint(range(first, first + count)):
            for number, answer in enumerate(ask(name, tasks.tasks[name], count, asked)):
                if first + number in wanted:
                    yield first + number, answer
        first += count


class Handed:
    """A loaded model as the harness calls it: no nn.Module, whose weights it would tie anew."""

    def __init__(self, base: Base, model: Any):
        self.base, self.model, self.config, self.device = base, model, base.model.config, base.device

    @torch.no_grad()
    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        with self.base.compute():
            return self.model(*arguments, use_cache=False, **settings)

    @torch.no_grad()
    def generate(self, **settings: Any) -> Any:
        """transformers' own."""
        with self.base.compute():
            return self.model.generate(**settings)


def harness_model(base: Base, model: Any, batch_size: int) -> Any:
    """The model and a copy of its tokenizer, to which the harness adds padding, as the harness's HFLM."""
    with quiet():
        return library("lm_eval.models.huggingface").HFLM(
            pretrained=Handed(base, model),
            tokenizer=copy.deepcopy(base.tokenizer),
            backend="causal",
            batch_size=batch_size,
            softmax_dtype=torch.float32,
        )


def ask(name: str, task: Any, count: int, model: Any) -> list[Answer]:
    """The answers to the first `count` rows of a task, in order, with what each of its metrics says of them."""
    with quiet(), seeded(model.device):
        task.set_fewshot_seed(seed=SHOTS_SEED)
        found = library("lm_eval.evaluator").evaluate(
            model, {"tasks": {name: task}}, limit=count, bootstrap_iters=0, log_samples=True
        )
    answers: dict[int, Answer] = {}
    for sample in found["samples"][name]:  # once for each filter of the answers
        row = sample["doc_id"]
        started = {"where": f"{name}:{row}", "group": name, "target": plain(sample["target"]), "answers": {}}
        answer = answers.setdefault(row, {**started, "metrics": {}})
        answer["answers"][sample["filter"]] = plain(sample["filtered_resps"])
        for metric in sample["metrics"]:
            answer["metrics"][label_of(metric, sample["filter"])] = plain(sample[metric])
    assert sorted(answers) == list(range(count)), "an answer to each row"
    return [answers[row] for row in range(count)]


def plain(value: Any) -> Any:
    """A value as JSON has it: None for what is no number, words for what it has none for."""
    if isinstance(value, (np.generic, np.ndarray)):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _notes(told: set[str], left_out: Sequence[str], answers: Sequence[Answer]) -> list[str]:
    """The metrics of which there is no figure."""
    given = {f"{answer['group']}.{label}" for answer in answers for label in answer["metrics"]}
    names = [*left_out, *sorted(given - told - set(left_out))]
    return [f"in the answers, without a figure, as no mean of the rows: {', '.join(names)}"] if names else []
