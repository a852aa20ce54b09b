"""Metrics of class ids from their counts, as GLUE and scikit-learn define them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qlora_cli.errors import UserError


def class_rows(predictions: Sequence[int], references: Sequence[int]) -> np.ndarray:
    """(n, 2) float64: the predicted and the right class id. Raises UserError on one that is none, as -1 is."""
    assert len(predictions) == len(references) > 0, "a prediction for each reference"
    rows = np.array([predictions, references], dtype=np.float64).T
    for side, column in (("predicted", rows[:, 0]), ("right", rows[:, 1])):
        if (wrong := np.flatnonzero((column < 0) | (column != np.floor(column)))).size:
            what = f"row {wrong[0]} has {column[wrong[0]]:g} as its {side} class, and classes count from 0"
            raise UserError("labels", what, "use a split whose labels are published: those of a test set may be -1")
    return rows


def binary_rows(predictions: Sequence[int], references: Sequence[int]) -> np.ndarray:
    """As class_rows; raises UserError on a class other than 0 and 1."""
    rows = class_rows(predictions, references)
    if rows.max() > 1:
        what = f"f1 is of the classes 0 and 1, and there is class {rows.max():g}"
        raise UserError("metric f1", what, "use macro_f1, or accuracy")
    return rows


def accuracy_rows(predictions: Sequence[int], references: Sequence[int]) -> np.ndarray:
    """(n, 1) float64: 1 where the class is right."""
    rows = class_rows(predictions, references)
    return (rows[:, :1] == rows[:, 1:]).astype(np.float64)


def counts(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(classes,) int64 each: rows of a class that are right, that are predicted as it, that belong to it."""
    predicted, right = rows.astype(np.int64).T
    num_classes = int(rows.max()) + 1
    hits = np.bincount(predicted[predicted == right], minlength=num_classes)
    return hits, np.bincount(predicted, minlength=num_classes), np.bincount(right, minlength=num_classes)


def f1(rows: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN) of class 1; 0 where the class is nowhere."""
    predicted, right = rows.T
    both = np.count_nonzero(predicted) + np.count_nonzero(right)  # = 2 TP + FP + FN
    return float(2 * np.count_nonzero(predicted * right) / both) if both else 0.0


def macro_f1(rows: np.ndarray) -> float:
    """The plain mean of the F1 of every class that is predicted or right in some row of this sample."""
    hits, predicted, right = counts(rows)
    there = predicted + right > 0
    return float((2 * hits[there] / (predicted + right)[there]).mean())


def matthews(rows: np.ndarray) -> float:
    """Matthews' correlation for any number of classes (Gorodkin 2004); 0 where one side has only one class."""
    hits, predicted, right = counts(rows)
    rows_squared = len(rows) ** 2
    covariance = len(rows) * int(hits.sum()) - int(predicted @ right)
    variances = (rows_squared - int(predicted @ predicted)) * (rows_squared - int(right @ right))
    return covariance / variances**0.5 if variances else 0.0
