"""What a recipe's task asks of its other keys, as rules of `rules.py`."""

from __future__ import annotations

from collections.abc import Iterator

from qlora_cli.recipe.located_yaml import KeyPath, show
from qlora_cli.recipe.problems import Problem
from qlora_cli.recipe.schema import Recipe, Source
from qlora_cli.recipe.values import no_effect

TEXT_TASKS = ("causal_lm", "seq2seq_lm")
"""Tasks that write text."""

FORMATS_OF = {
    "seq2seq_lm": (
        "source_target",
        "prompt_completion",
        "input_output",
        "question_answer",
        "summarisation",
        "alpaca",
    ),
    "sequence_classification": ("classification",),
    "question_answering": ("squad",),
}
"""Row formats of the tasks whose rows are no conversations; causal_lm has all others."""

FOR_ANOTHER_TASK = ("source_target", "classification", "squad")
"""Row formats that causal_lm does not have."""


def classes_are_named_or_counted(recipe: Recipe) -> Iterator[Problem]:
    """`sequence_classification` has `model.labels` or `model.num_labels`, and no other task has."""
    model = recipe.model
    if model.task != "sequence_classification":
        for name in ("labels", "num_labels"):
            yield from no_effect(recipe, "model", name, f"with `task: {model.task}`")
        return
    if not model.labels and model.num_labels is None:
        todo = "Set `model.labels` to the names of the classes, `num_labels` to their number, or to 1 for numbers"
        yield Problem(("model", "task"), "`task: sequence_classification` without its classes", todo)
    if model.labels and model.num_labels is not None:
        what = f"`num_labels: {model.num_labels}` beside `labels`"
        yield Problem(("model", "num_labels"), what, "Keep one of the two")
    if model.labels and len(set(model.labels)) < max(len(model.labels), 2):
        what = f"{show(model.labels)} are not two different classes or more"
        yield Problem(("model", "labels"), what, "Name each class once; for numbers set `num_labels: 1` instead")


def a_row_is_of_the_task(recipe: Recipe) -> Iterator[Problem]:
    """A source's `format` is one of the task's; `template.pair` is for sequence_classification, no `template` for
    question_answering, `template.chat` for causal_lm."""
    task = recipe.model.task
    known = FORMATS_OF.get(task, ())
    for place, source in _sources(recipe):
        wrong = source.format in FOR_ANOTHER_TASK if task == "causal_lm" else source.format not in ("auto", *known)
        if wrong:
            todo = f"Use {', '.join(known)} or auto" if known else "Use auto, or set `model.task`"
            yield Problem((*place, "format"), f"`format: {source.format}` is not for `task: {task}`", todo)
        if source.template is None:
            continue
        if task == "question_answering":
            what = "`template` cannot say where an answer stands"
            yield Problem((*place, "template"), what, "Write rows as SQuAD does: context, question, answers")
        if source.template.pair is not None and task != "sequence_classification":
            what = f"`pair` has no effect with `task: {task}`"
            yield Problem((*place, "template", "pair"), what, "Delete it")
        if source.template.chat and task != "causal_lm":
            what = f"`chat: true` has no effect with `task: {task}`"
            yield Problem((*place, "template", "chat"), what, "Delete it")


def _sources(recipe: Recipe) -> Iterator[tuple[KeyPath, Source]]:
    """Every source whose rows are the task's, with its place; those of `suite: choice` are of formats of their own."""
    for role in ("train", "eval"):
        yield from ((("data", role, index), source) for index, source in enumerate(getattr(recipe.data, role)))
    for number, suite in enumerate(recipe.evaluation.suites):
        if suite.suite != "choice":
            place = ("evaluation", "suites", number, "data")
            yield from (((*place, index), source) for index, source in enumerate(suite.data))


def conversations_are_for_causal_lm(recipe: Recipe) -> Iterator[Problem]:
    """`data.packing: true`, `train_on` and the chat template are for causal_lm."""
    if recipe.model.task == "causal_lm":
        return
    reason = f"with `task: {recipe.model.task}`"
    for name in ("packing", "train_on", "chat_template", "chat_template_kwargs"):
        if name != "packing" or recipe.data.packing is True:
            yield from no_effect(recipe, "data", name, reason)
    if recipe.adapter.loftq.calibration:
        what = f"`calibration: {recipe.adapter.loftq.calibration}` {reason} is not available yet"
        yield Problem(("adapter", "loftq", "calibration"), what, "Delete it")


def lengths_are_of_the_task(recipe: Recipe) -> Iterator[Problem]:
    """`source_max_length` and `target_max_length` are for tasks that write text, `doc_stride` is for
    question_answering, whose windows are never truncated or skipped."""
    task = recipe.model.task
    if task not in TEXT_TASKS:
        for name in ("source_max_length", "target_max_length"):
            yield from no_effect(recipe, "data", name, f"with `task: {task}`")
    if task != "question_answering":
        yield from no_effect(recipe, "data", "doc_stride", f"with `task: {task}`")
        yield from no_effect(recipe, "evaluation", "max_answer_length", f"with `task: {task}`")
    else:
        yield from no_effect(recipe, "data", "on_long_row", f"with `task: {task}`: long contexts are read in windows")
    if task not in TEXT_TASKS:
        for name in ("max_new_tokens", "num_beams", "length_penalty", "no_repeat_ngram_size"):
            yield from no_effect(recipe, "evaluation", name, f"with `task: {task}`")


TASK_RULES = (
    classes_are_named_or_counted,
    a_row_is_of_the_task,
    conversations_are_for_causal_lm,
    lengths_are_of_the_task,
)
