"""Percentile bootstrap: how far a figure, or the difference of two, moves when the rows are drawn again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Figure = Callable[[np.ndarray], float]
"""A metric over any sample of rows (n, k): `Metric.figure`."""


def interval(
    figure: Figure, rows: np.ndarray, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The ends between which the middle `level` of the figures of `resamples` draws of n rows lie.

    rows (n, k) float64; n rows are drawn with replacement from n. The same seed draws the same rows for every metric
    and model. A single row gives its own figure at both ends. Source: Efron 1979.
    """
    assert len(rows) > 0, "no rows"
    assert resamples > 0, "no resamples"
    assert 0 < level < 1, "a level is a share"
    draws, n = np.random.default_rng(seed), len(rows)
    figures = [figure(rows[draws.integers(n, size=n)]) for _ in range(resamples)]
    low, high = np.quantile(figures, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    figure: Figure,
    rows_a: np.ndarray,
    rows_b: np.ndarray,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """The figure of a less that of b, and the ends of its interval: every resample draws the same rows of both.

    rows_a, rows_b (n, k) float64, row i of both of the same example. 0 lies outside where the difference is more than
    the choice of rows explains.
    """
    assert rows_a.shape == rows_b.shape, "the same rows of both"
    columns = rows_a.shape[1]

    def difference(pairs: np.ndarray) -> float:
        return figure(pairs[:, :columns]) - figure(pairs[:, columns:])

    pairs = np.hstack([rows_a, rows_b])
    return difference(pairs), *interval(difference, pairs, resamples=resamples, level=level, seed=seed)
