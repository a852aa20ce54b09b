"""What the section `evaluation` asks for, as rules of `rules.py`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from qlora_cli.recipe.located_yaml import KeyPath, show
from qlora_cli.recipe.problems import Problem
from qlora_cli.recipe.schema import Recipe, Source
from qlora_cli.recipe.values import given, no_effect

TASKS_OF = {
    "loss": ("causal_lm", "seq2seq_lm", "sequence_classification", "question_answering"),
    "choice": ("causal_lm",),
    "generate": ("causal_lm", "seq2seq_lm"),
    "classify": ("sequence_classification",),
    "squad": ("question_answering",),
    "lm_eval": ("causal_lm",),
}
"""The tasks that each suite can measure."""

KEYS_OF = {
    "metrics": ("generate", "classify"),
    "pattern": ("generate",),
    "delimiter": ("choice",),
    "shots": ("choice",),
    "shots_from": ("choice",),
    "tasks": ("lm_eval",),
    "data": ("loss", "choice", "generate", "classify", "squad"),
}
"""The suites that read a key."""

DEFAULTS = {
    "causal_lm": ("loss", "generate"),
    "seq2seq_lm": ("loss", "generate"),
    "sequence_classification": ("loss", "classify"),
    "question_answering": ("loss", "squad"),
}
"""What is measured of a task where the recipe names no suites."""

READ_BY = {
    **dict.fromkeys(("max_new_tokens", "num_beams", "length_penalty", "no_repeat_ngram_size"), "generate"),
    "max_answer_length": "squad",
}
"""Keys of `evaluation` that one suite alone reads."""


def measured_sources(recipe: Recipe) -> Iterator[tuple[KeyPath, Source]]:
    """Every source whose rows are measured, with its place: of `data.eval`, and of the suites."""
    yield from ((("data", "eval", index), source) for index, source in enumerate(recipe.data.eval))
    for number, suite in enumerate(recipe.evaluation.suites):
        place = ("evaluation", "suites", number, "data")
        yield from (((*place, index), source) for index, source in enumerate(suite.data))


def a_suite_can_measure_the_task(recipe: Recipe) -> Iterator[Problem]:
    """`evaluation.suites` are for the recipe's task; each has its own name."""
    seen: set[str] = set()
    for index, suite in enumerate(recipe.evaluation.suites):
        place = ("evaluation", "suites", index)
        task = recipe.model.task
        if task not in TASKS_OF[suite.suite]:
            known = ", ".join(kind for kind, tasks in TASKS_OF.items() if task in tasks)
            what = f"`suite: {suite.suite}` cannot measure `task: {task}`"
            yield Problem((*place, "suite"), what, f"Choose from {known}")
        name = suite.name or suite.suite
        if name in seen:
            yield Problem(
                (*place, "name" if suite.name else "suite"), f"two suites are named {show(name)}", "Set `name`"
            )
        if suite.name is not None and not suite.name.replace("-", "").replace("_", "").isalnum():
            what = f"`name: {show(suite.name)}` is no name of a file"
            yield Problem((*place, "name"), what, "Use letters, digits, - and _")
        seen.add(name)


def a_key_of_a_suite_is_read(recipe: Recipe) -> Iterator[Problem]:
    """A key of a suite is one that it reads: `metrics` of generate and classify, `shots` of choice, `tasks` of lm_eval;
    `pattern` goes with the metric regex, `shots_from` with `shots`; choice needs `data`, lm_eval `tasks`. A source of
    choice has no `format` or `template`: its rows have columns of their own."""
    for index, suite in enumerate(recipe.evaluation.suites):
        place = ("evaluation", "suites", index)
        for name, kinds in KEYS_OF.items():
            if given(suite, name) and suite.suite not in kinds:
                yield Problem((*place, name), f"`{name}` has no effect on `suite: {suite.suite}`", "Delete it")
        if suite.suite == "choice" and not suite.data:
            yield Problem((*place, "suite"), "`suite: choice` without `data`", "Name its files: data: [{path: ...}]")
        if suite.suite == "lm_eval" and not suite.tasks:
            yield Problem((*place, "suite"), "`suite: lm_eval` without `tasks`", "Name them: tasks: [arc_easy]")
        if suite.suite == "classify" and "regex" in suite.metrics:
            yield Problem((*place, "metrics"), "the metric `regex` is for `suite: generate`", "Delete it")
        elif ("regex" in suite.metrics) != (suite.pattern is not None):
            todo = "Set both, or neither"
            yield Problem((*place, "metrics"), "the metric `regex` and `pattern` go together", todo)
        if suite.shots_from is not None and not suite.shots:
            yield Problem((*place, "shots_from"), "`shots_from` has no effect with `shots: 0`", "Set `shots`")
        for number, source in enumerate(suite.data if suite.suite == "choice" else []):
            for name in ("format", "template"):
                if given(source, name):
                    what = f"`{name}` has no effect on `suite: choice`, whose columns say what a row is"
                    yield Problem((*place, "data", number, name), what, "Delete it")


METRICS_OF = {
    "generate": (
        *("exact_match", "squad_exact_match", "squad_f1", "gsm8k", "json_valid", "json_equal", "regex"),
        *("rouge1", "rouge2", "rougeL", "rougeLsum", "bleu"),
    ),
    "classify": ("accuracy", "f1", "macro_f1", "matthews"),
    "numbers": ("pearson", "spearman"),
}
"""Metrics by what they are of: generated texts, classes, numbers. evaluate/metrics.py computes them."""


def a_metric_is_of_the_answers(recipe: Recipe) -> Iterator[Problem]:
    """`metrics` of a suite are of its answers: texts, classes or numbers; `pattern` is a regular expression."""
    for index, suite in enumerate(recipe.evaluation.suites):
        place = ("evaluation", "suites", index)
        kind = "numbers" if suite.suite == "classify" and recipe.model.num_labels == 1 else suite.suite
        known = METRICS_OF.get(kind, ())
        for at, name in enumerate(suite.metrics if known else ()):
            if name not in (*known, "regex"):  # which another rule ties to `pattern`
                near = difflib.get_close_matches(name, known, n=1)
                todo = f"Perhaps {near[0]}? " if near else ""
                what = f"{show(name)} is no metric of these answers"
                yield Problem((*place, "metrics", at), what, f"{todo}Choose from {', '.join(known)}")
        num_labels = len(recipe.model.labels) or recipe.model.num_labels
        if suite.suite == "classify" and "f1" in suite.metrics and num_labels not in (1, 2):
            what = f"`f1` is of two classes, not {num_labels}"
            yield Problem((*place, "metrics", suite.metrics.index("f1")), what, "Use macro_f1")
        try:
            re.compile(suite.pattern or "")
        except re.error as error:
            what = f"{show(suite.pattern)} is no regular expression: {error}"
            yield Problem((*place, "pattern"), what, "Write it as Python's re does, in single quotes")


def how_answers_are_given_is_of_a_suite(recipe: Recipe) -> Iterator[Problem]:
    """`evaluation.max_new_tokens`, `num_beams`, `length_penalty` and `no_repeat_ngram_size` are for `suite: generate`,
    `max_answer_length` for `suite: squad`: where suites are named, one is such. `length_penalty` is for beams."""
    kinds = {suite.suite for suite in recipe.evaluation.suites}
    for name, kind in READ_BY.items():
        if kinds and kind not in kinds and recipe.model.task in TASKS_OF[kind]:
            yield from no_effect(recipe, "evaluation", name, f"without a `suite: {kind}`")
    if recipe.evaluation.num_beams == 1:
        yield from no_effect(recipe, "evaluation", "length_penalty", "with `num_beams: 1`")


def what_is_run_in_training_exists(recipe: Recipe) -> Iterator[Problem]:
    """`evaluation.during_training` names suites; `best_metric` needs something that is measured in training, and
    `early_stopping_patience` needs `best_metric`."""
    evaluation = recipe.evaluation
    names = [suite.name or suite.suite for suite in evaluation.suites] or DEFAULTS[recipe.model.task]
    for index, name in enumerate(evaluation.during_training):
        if name not in names:
            what = f"{show(name)} is no suite"
            yield Problem(("evaluation", "during_training", index), what, f"Choose from {', '.join(names)}")
    held_out = recipe.data.eval or recipe.data.eval_fraction
    if evaluation.best_metric is not None and not held_out and not evaluation.during_training:
        todo = "Hold rows out (`data.eval`), or name suites in `during_training`"
        what = f"`best_metric: {evaluation.best_metric}`, and nothing is measured in training"
        yield Problem(("evaluation", "best_metric"), what, todo)
    if evaluation.best_metric is None:
        reason = "without `best_metric`"
        yield from no_effect(recipe, "evaluation", "early_stopping_patience", reason)


SUITE_RULES = (
    a_suite_can_measure_the_task,
    a_key_of_a_suite_is_read,
    a_metric_is_of_the_answers,
    how_answers_are_given_is_of_a_suite,
    what_is_run_in_training_exists,
)
