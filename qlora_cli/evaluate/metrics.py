"""The metrics, by name: what each row adds, and the figure over any sample of rows, as a bootstrap draws them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from qlora_cli.errors import UserError
from qlora_cli.evaluate import answer_metrics as answers
from qlora_cli.evaluate import class_metrics as classes
from qlora_cli.evaluate import json_metrics as json_texts
from qlora_cli.evaluate import overlap_metrics as overlap
from qlora_cli.evaluate import value_metrics as values


@dataclass(frozen=True)
class Metric:
    """rows(predictions, references) -> float64 (n, k): what each row adds; figure((n, k)) -> float: over any of them.

    kind: what predictions are: texts with a list[str] of acceptable answers each, class ids (int), numbers (float).
    A figure is a share from 0 to 1, or a correlation from -1 to 1; `bleu` alone is in sacrebleu's 0 to 100. It is never
    not a number: what is undefined is 0, and `about` says so. `rows` raises UserError where it cannot be computed.
    """

    kind: Literal["text", "label", "value"]
    rows: Callable[[Sequence[Any], Sequence[Any]], np.ndarray]
    figure: Callable[[np.ndarray], float]
    about: str


def mean(rows: np.ndarray) -> float:
    """The mean of the only column."""
    return float(rows[:, 0].mean())


def text(score: answers.Score, about: str) -> Metric:
    """The mean of a score for each text."""
    return Metric("text", partial(answers.rows, score), mean, about)


def regex_metric(pattern: str) -> Metric:
    """The share of texts in which the pattern is found, by `re.search`: the first match, anywhere.

    With a group in the pattern, group 1 must also equal an answer but for white space at both ends; a group that took
    no part in the match equals none. Without one the references are not read. Flags go into the pattern: (?i), (?s).
    Raises UserError where the pattern is none.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        todo = "write it as Python's re does, in single quotes in YAML"
        raise UserError("metric regex", f"{pattern!r} is no regular expression: {error}", todo) from None
    what = "group 1 of the first match equals an answer" if compiled.groups else "a match is found"
    return text(partial(answers.found, compiled), f"share of texts in which {what} of {pattern!r}")


def rouge(name: str, what: str) -> Metric:
    """The mean F-measure of rouge-score: its tokeniser and Porter stemmer, the best reference of each row."""
    about = f"F-measure of {what}, stemmed, best reference (rouge-score; Lin 2004)"
    return Metric("text", partial(overlap.rouge_rows, name), mean, about)


METRICS: dict[str, Metric] = {
    "accuracy": Metric("label", classes.accuracy_rows, mean, "share of rows with the right class (GLUE)"),
    "f1": Metric(
        "label", classes.binary_rows, classes.f1, "F1 of class 1 of two (GLUE: MRPC, QQP); 0 where no row is in class 1"
    ),
    "macro_f1": Metric(
        "label", classes.class_rows, classes.macro_f1, "mean F1 of the classes that are predicted or right somewhere"
    ),
    "matthews": Metric(
        "label",
        classes.class_rows,
        classes.matthews,
        "Matthews' correlation (GLUE: CoLA); 0 where one side is constant",
    ),
    "pearson": Metric(
        "value", values.value_rows, values.pearson, "linear correlation (GLUE: STS-B); 0 where one side is constant"
    ),
    "spearman": Metric(
        "value", values.value_rows, values.spearman, "correlation of ranks (GLUE: STS-B); 0 where one side is constant"
    ),
    "exact_match": text(answers.exact, "share of texts equal to an answer but for white space at both ends"),
    "squad_exact_match": text(answers.squad_exact, "share equal to an answer as SQuAD normalises (evaluate-v2.0.py)"),
    "squad_f1": text(answers.squad_f1, "F1 of the words shared with the best answer (evaluate-v2.0.py), mean of rows"),
    "gsm8k": text(answers.gsm8k, "share with the right final number: after '####', else the last (GSM8K, lm-eval)"),
    "json_valid": Metric("text", json_texts.valid_rows, mean, "share of texts that are one JSON value (RFC 8259)"),
    "json_equal": Metric(
        "text", json_texts.equal_rows, mean, "share of texts that are JSON and the value of an answer"
    ),
    "rouge1": rouge("rouge1", "single words"),
    "rouge2": rouge("rouge2", "pairs of words"),
    "rougeL": rouge("rougeL", "the longest common subsequence of the whole texts"),
    "rougeLsum": rouge("rougeLsum", "the longest common subsequences by sentence, as papers report CNN/DailyMail"),
    "bleu": Metric(
        "text", overlap.bleu_rows, overlap.bleu, "corpus BLEU from 0 to 100 (sacrebleu: 13a, exponential smoothing)"
    ),
}
"""By name; a metric that needs a pattern is made by `regex_metric`."""
