"""The best approximation of a matrix at a given rank, by random projection: scripts/bench_loftq.py has the times."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

OVERSAMPLING, ITERATIONS, MOST_ITERATIONS = 16, 4, 12
"""Directions beyond the rank, and power iterations: within 0.7% of the exact residual (tests/quant/test_svd.py)."""

SETTLED = 1e-3
"""Relative change of the residual below which another iteration is not worth its time."""


class LowRank(NamedTuple):
    """left (m, r) · diag(values (r,)) · right (n, r)ᵀ, left and right orthonormal, values falling; all fp32.

    basis: (n, r + OVERSAMPLING), where a search in a matrix that has changed a little may start.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    basis: Tensor


def low_rank(matrix: Tensor, rank: int, seed: int = 0, basis: Tensor | None = None) -> LowRank:
    """The matrix (m, n) in fp32 to its `rank` largest singular directions.

    Randomised SVD with power iterations (Halko, Martinsson, Tropp 2011, algorithm 4.4), iterated on until the residual
    has settled; from a basis of a matrix that was much the same it settles sooner. Where the rank is most of the
    matrix's own the SVD is exact.
    """
    rows, columns = matrix.shape
    assert 0 < rank <= min(rows, columns), "a rank that the matrix can have"
    width = min(rank + OVERSAMPLING, rows, columns)
    if 2 * width >= min(rows, columns):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return LowRank(left[:, :rank], values[:rank], right[:rank].T, right[:width].T)
    least = 1 if basis is not None else ITERATIONS
    if basis is None:
        generator = torch.Generator().manual_seed(seed)
        basis = torch.randn((columns, width), generator=generator).to(matrix.device, matrix.dtype)
    energy, residual = matrix.square().sum(dtype=torch.float64), torch.inf
    for iteration in range(1, MOST_ITERATIONS + 1):
        image = torch.linalg.qr(matrix @ basis).Q
        basis, triangle = torch.linalg.qr(matrix.T @ image)  # whose singular values are the triangle's, a small matrix
        before, residual = residual, _residual(energy, triangle, rank)
        if iteration >= least and before - residual <= SETTLED * residual:
            break
    left, values, right = torch.linalg.svd(triangle.T)
    return LowRank(image @ left[:, :rank], values[:rank], basis @ right[:rank].T, basis)


def _residual(energy: Tensor, triangle: Tensor, rank: int) -> float:
    """‖matrix - its approximation‖, from the singular values of its projection's triangle."""
    values = torch.linalg.svdvals(triangle)[:rank]
    return float((energy - values.square().sum(dtype=torch.float64)).clamp(min=0).sqrt())
