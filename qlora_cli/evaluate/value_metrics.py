"""Correlations of numbers, as GLUE's STS-B asks for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qlora_cli.errors import Exit, UserError
from qlora_cli.evaluate.extra import library


def value_rows(predictions: Sequence[float], references: Sequence[float]) -> np.ndarray:
    """(n, 2) float64: the predicted and the right number. Raises UserError on one that is not finite."""
    assert len(predictions) == len(references) > 0, "a prediction for each reference"
    rows = np.array([predictions, references], dtype=np.float64).T
    if (wrong := np.flatnonzero(~np.isfinite(rows).all(axis=1))).size:
        predicted, right = rows[wrong[0]]
        what = f"row {wrong[0]} has the prediction {predicted:g} and the reference {right:g}: not finite"
        raise UserError("predictions", what, "train with a lower learning rate, or in bfloat16", Exit.FAILED)
    return rows


def pearson(rows: np.ndarray) -> float:
    """Pearson's correlation, -1 to 1; 0 where a side is constant (and for a single row), where it is undefined."""
    if (rows.min(axis=0) == rows.max(axis=0)).any():
        return 0.0
    centred = rows - rows.mean(axis=0)
    unit = centred / np.abs(centred).max(axis=0)  # so that squares of tiny or huge numbers stay in range
    x, y = (unit / np.linalg.norm(unit, axis=0)).T
    return float(np.clip(x @ y, -1.0, 1.0))


def spearman(rows: np.ndarray) -> float:
    """Pearson's correlation of the ranks, ties sharing their mean rank; 0 where a side is constant."""
    return pearson(library("scipy.stats").rankdata(rows, axis=0))
