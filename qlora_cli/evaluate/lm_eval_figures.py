"""The figures of lm-evaluation-harness over any sample of its rows, as a bootstrap draws them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from qlora_cli.evaluate.extra import library
from qlora_cli.evaluate.lm_eval_tasks import Tasks
from qlora_cli.evaluate.overlap_metrics import bleu, bleu_rows
from qlora_cli.evaluate.suite import Answer, Measure

Items = Sequence[Any]
"""What a metric says of each row, as the answers hold it: a number, or a list of what is needed of the row."""


@dataclass(frozen=True)
class Aggregation:
    """One of the harness's: rows(items) is float64 (n, k); figure((n, k)) what the harness makes of all items."""

    figure: Callable[[np.ndarray], float]
    rows: Callable[[Items], np.ndarray] = lambda items: np.array(items, np.float64).reshape(len(items), -1)


def mean(rows: np.ndarray) -> float:
    """The mean of the only column."""
    return float(rows[:, 0].mean())


def nanmean(rows: np.ndarray) -> float:
    """The mean of the rows that have a number; not a number where none has."""
    return mean(found) if len(found := rows[~np.isnan(rows[:, 0])]) else math.nan


def median(rows: np.ndarray) -> float:
    """The upper of the two in the middle, as the harness takes it."""
    return float(np.sort(rows[:, 0])[len(rows) // 2])


def weighted_mean(rows: np.ndarray) -> float:
    """Columns: a sum of a row, and its weight."""
    return float(rows[:, 0].sum() / rows[:, 1].sum())


def of_classes(name: str, rows: np.ndarray) -> float:
    """Columns: the right class and the predicted one; scikit-learn's figure, by the harness's function of this name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a sample of one class
        return float(getattr(library("lm_eval.api.metrics"), name)(rows.astype(int).tolist()))


def brier(rows: np.ndarray) -> float:
    """Columns: the right class, and the probability of each."""
    right = np.eye(rows.shape[1] - 1)[rows[:, 0].astype(int)]
    return float(((rows[:, 1:] - right) ** 2).sum(axis=1).mean())


def brier_rows(items: Items) -> np.ndarray:
    """Items (right class, probabilities)."""
    return np.array([[right, *probabilities] for right, probabilities in items], np.float64)


def texts(items: Items) -> np.ndarray:
    """Items (reference or references, prediction or a list of it alone), as BLEU counts them."""
    references = [[one] if isinstance(one, str) else one for one, _ in items]
    return bleu_rows([one if isinstance(one, str) else one[0] for _, one in items], references)


AGGREGATIONS: dict[str, Aggregation] = {
    "mean": Aggregation(mean),
    "nanmean": Aggregation(nanmean),
    "median": Aggregation(median),
    "perplexity": Aggregation(lambda rows: math.exp(-mean(rows))),
    "weighted_perplexity": Aggregation(lambda rows: math.exp(-weighted_mean(rows))),
    "bits_per_byte": Aggregation(lambda rows: -weighted_mean(rows) / math.log(2)),
    "f1_score": Aggregation(partial(of_classes, "f1_score")),
    "matthews_corrcoef": Aggregation(partial(of_classes, "matthews_corrcoef")),
    "brier_score": Aggregation(brier, brier_rows),
    "bleu": Aggregation(bleu, texts),
}
"""By the name of the function in lm_eval/api/metrics.py (v0.4.13). Others are told as left out."""


def label_of(metric: str, filter_name: str) -> str:
    """A metric's name in the answers, behind its task's in figures: with the filter of the answers, if it has one."""
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def measures_of(tasks: Tasks) -> tuple[dict[str, Measure], list[str]]:
    """A figure for every metric of every task, and of every group that has its own; and the names of those left out.

    Left out is a metric whose aggregation is a task's own, or needs more than numbers of each row.
    """
    measures: dict[str, Measure] = {}
    left_out: list[str] = []
    means: dict[str, list[str]] = {}
    for task_name, task in tasks.tasks.items():
        for metric, function in task.aggregation().items():
            aggregation = _known(function)
            for label in [label_of(metric, each.name) for each in task._filters]:
                if aggregation is None:
                    left_out.append(f"{task_name}.{label}")
                    continue
                measures[f"{task_name}.{label}"] = Measure(
                    partial(_task_rows, task_name, label, aggregation),
                    partial(_figure, aggregation.figure),
                    task.higher_is_better().get(metric) is False,
                )
                if aggregation is AGGREGATIONS["mean"]:
                    means.setdefault(label, []).append(task_name)
    for name, group in tasks.groups.items():
        measures |= _group_measures(name, group, means)
    return measures, left_out


def _known(function: Callable[..., Any]) -> Aggregation | None:
    name = getattr(function, "__name__", "")
    ours = getattr(library("lm_eval.api.metrics"), name, None) is function
    return AGGREGATIONS.get(name) if ours else None


def _task_rows(task: str, label: str, aggregation: Aggregation, answers: Sequence[Answer]) -> np.ndarray:
    items = [answer["metrics"][label] for answer in answers if answer["group"] == task and label in answer["metrics"]]
    return aggregation.rows(items) if items else np.full((1, 1), np.nan)


def _figure(figure: Callable[[np.ndarray], float], rows: np.ndarray) -> float:
    """The figure, not a number where no answer has the metric."""
    return math.nan if rows.shape == (1, 1) and np.isnan(rows).all() else figure(rows)


def _group_measures(name: str, group: Any, means: dict[str, list[str]]) -> dict[str, Measure]:
    """The means over a group's tasks, of rows (weight_by_size) or of the tasks' own means; () where it asks for none.

    Source: lm_eval/api/group.py, Group.aggregate (v0.4.13).
    """
    measures = {}
    members = [task.task_name for task in group.get_all_tasks()]
    for wanted in group.aggregate_metric_list or ():
        filters = wanted.filter_list
        for label, with_it in means.items():
            metric, _, filter_name = label.partition(",")
            chosen = [task for task in members if task in with_it]
            asked = metric == wanted.metric and (filters is None or (filter_name or "none") in filters)
            if asked and chosen:
                figure = mean if wanted.weight_by_size else mean_of_tasks
                measures[f"{name}.{label}"] = Measure(partial(_group_rows, chosen, label), partial(_figure, figure))
    return measures


def _group_rows(tasks: Sequence[str], label: str, answers: Sequence[Answer]) -> np.ndarray:
    """Columns: what the metric says of a row, and the number of its task."""
    rows = [
        (answer["metrics"][label], tasks.index(answer["group"]))
        for answer in answers
        if answer["group"] in tasks and label in answer["metrics"]
    ]
    return np.array(rows, np.float64) if rows else np.full((1, 1), np.nan)


def mean_of_tasks(rows: np.ndarray) -> float:
    """The mean of the means of each task that has a row. Columns: a number, and the number of its task."""
    numbers = rows[:, 1].astype(int)
    counts = np.bincount(numbers)
    sums = np.bincount(numbers, weights=rows[:, 0])
    return float((sums[counts > 0] / counts[counts > 0]).mean())
