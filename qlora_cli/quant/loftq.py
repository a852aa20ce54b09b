"""LoftQ: a quantised weight and an adapter that starts at what quantisation lost (Li et al. 2023, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from qlora_cli.quant.svd import LowRank, low_rank

S = TypeVar("S")
"""What a quantiser stores."""

Quantizer = Callable[[Tensor], tuple[S, Tensor]]
"""A weight (out, in) fp32 to what is stored of it and the fp32 values that a layer multiplies with."""

Order = Literal["quantize_first", "svd_first"]


@dataclass(frozen=True)
class Start(Generic[S]):
    """Where training starts: W ≈ Q + scaling · B A.

    stored: Q as it is stored. A: (r, in), B: (out, r), fp32; both None where no iterate beats plain quantisation.
    LoftQ's and PiSSA's are balanced: of equal norm, row by row and column by column. plain, error: ‖W - q(W)‖ and
    ‖W - (Q + scaling · B A)‖, divided by ‖W‖; iteration: the one that was kept, 0 for plain quantisation; errors: of
    every iteration.
    """

    stored: S
    A: Tensor | None
    B: Tensor | None
    plain: float
    error: float
    iteration: int
    errors: tuple[float, ...] = ()


class Measure:
    """The norm that an error is measured and approximated in: Frobenius', or that of what the inputs make of it.

    root: (in, in) fp32, lower triangular, with root rootᵀ = E[x xᵀ] over the layer's inputs x: ‖E root‖ is the root
    mean square of E x. Any square root has the same norm and the same best B A (QERA, Zhang et al. 2024, theorem 1);
    Cholesky's is the cheapest.
    """

    def __init__(self, root: Tensor | None = None) -> None:
        self.root = root

    def norm(self, error: Tensor) -> float:
        """Of an (out, in) error."""
        return float((error if self.root is None else error @ self.root).norm())

    def low_rank(self, error: Tensor, rank: int, basis: Tensor | None) -> LowRank:
        """The matrix of a rank that is nearest to the error in this norm."""
        if self.root is None:
            return low_rank(error, rank, basis=basis)
        found = low_rank(error @ self.root, rank, basis=basis)
        right = torch.linalg.solve_triangular(self.root.T, found.right, upper=True)  # (U S) (root⁻ᵀ V)ᵀ
        orthonormal, triangle = torch.linalg.qr(right)
        # PEFT's training is wrecked by unbalanced factors: singular values again, of B A and not of B A root
        left, values, turned = torch.linalg.svd(found.values.unsqueeze(1) * triangle.T)
        return LowRank(found.left @ left, values, orthonormal @ turned.T, found.basis)


@dataclass(frozen=True)
class Alternation:
    """How LoftQ alternates. order: LoftQ's own, or its variant that begins with an SVD of the weight and ends with a
    quantisation. measure: what makes the start aware of the layer's inputs."""

    iterations: int = 5
    order: Order = "quantize_first"
    measure: Measure = field(default_factory=Measure)


def loftq(weight: Tensor, quantizer: Quantizer[S], rank: int, scaling: float, alternation: Alternation) -> Start[S]:
    """Alternates quantisation of W - scaling · B A and an SVD of what it leaves; the best iterate is kept.

    weight: (out, in) fp32. quantizer: the one that is deployed, double quantisation and compute type included.
    scaling: the adapter's own, alpha / r or alpha / √r.
    The error of iterates may rise again (absmax codes of 2 bits do so), so every one is measured.
    """
    measure, order = alternation.measure, alternation.order
    norm = measure.norm(weight) or 1.0
    stored, values = quantizer(weight)
    plain = measure.norm(weight - values) / norm
    best: Start[S] = Start(stored, None, None, plain, plain, 0)
    errors: list[float] = []
    basis: Tensor | None = None
    product = torch.zeros_like(weight)
    for iteration in range(1, alternation.iterations + 1):
        if order == "quantize_first":
            if iteration > 1:
                stored, values = quantizer(weight - product)
            found = measure.low_rank(weight - values, rank, basis)
        else:
            found = measure.low_rank(weight - values if iteration > 1 else weight, rank, basis)
        basis = found.basis
        product = (found.left * found.values) @ found.right.T
        if order == "svd_first":
            stored, values = quantizer(weight - product)
        errors.append(error := measure.norm(weight - values - product) / norm)
        if error < best.error:
            best = Start(stored, *_balanced(found, scaling), plain, error, iteration)
    return replace(best, errors=tuple(errors))


def pissa(weight: Tensor, quantizer: Quantizer[S], rank: int, scaling: float) -> Start[S]:
    """The adapter starts as the principal part of the weight, of which the rest is quantised (Meng et al. 2024)."""
    a, b = _balanced(low_rank(weight, rank), scaling)
    return _rest_quantized(weight, quantizer, a, b, scaling)


def olora(weight: Tensor, quantizer: Quantizer[S], rank: int, scaling: float) -> Start[S]:
    """B starts as the first orthonormal columns of W = Q R, A as R's rows (Büyükakyüz 2024); the rest is quantised.

    As PEFT 0.21.2's `olora_init`, whose product too is subtracted with the scaling.
    """
    columns, _triangle = torch.linalg.qr(weight[:, :rank])  # Q's first columns depend on no others
    return _rest_quantized(weight, quantizer, columns.T @ weight, columns.contiguous(), scaling)


def _rest_quantized(weight: Tensor, quantizer: Quantizer[S], a: Tensor, b: Tensor, scaling: float) -> Start[S]:
    norm = float(weight.norm()) or 1.0
    product = scaling * (b @ a)
    plain = float((weight - quantizer(weight)[1]).norm()) / norm
    stored, values = quantizer(weight - product)
    return Start(stored, a, b, plain, float((weight - values - product).norm()) / norm, 1)


def _balanced(found: LowRank, scaling: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with scaling · B A the matrix that was found."""
    root = (found.values / scaling).sqrt()
    return (found.right * root).T.contiguous(), found.left * root
