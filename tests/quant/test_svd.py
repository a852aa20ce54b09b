"""The random SVD is the exact one to the tolerance that LoftQ promises, repeats itself, and starts warm."""

from __future__ import annotations

import pytest
import torch

from qlora_cli.quant.svd import low_rank


def matrix_of(rows: int, columns: int, decay: float, seed: int = 0) -> torch.Tensor:
    """Random directions with singular values that fall as 1 / (1 + i) ** decay; 0: those of noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((rows, columns), generator=generator)
    if not decay:
        return noise
    left, _, right = torch.linalg.svd(noise, full_matrices=False)
    return (left * (1 + torch.arange(len(right))) ** -decay) @ right


@pytest.mark.parametrize("decay", [0, 0.5, 1.5])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(256, 384, 8), (384, 256, 32), (512, 512, 64), (48, 40, 30)])
def test_the_residual_is_that_of_the_exact_svd(rows, columns, rank, decay):
    matrix = matrix_of(rows, columns, decay)
    found = low_rank(matrix, rank)
    values = torch.linalg.svdvals(matrix.double())
    best = values[rank:].square().sum().sqrt()
    off = (matrix.double() - (found.left * found.values).double() @ found.right.double().T).norm()
    assert off <= 1.007 * best + 1e-5
    for side in (found.left, found.right):
        torch.testing.assert_close(side.T @ side, torch.eye(rank), rtol=0, atol=1e-4)
    assert (found.values.diff() <= 1e-6).all()


def test_it_repeats_itself_and_leaves_the_global_generator_alone():
    matrix, state = matrix_of(256, 256, 0), torch.get_rng_state()
    first, second = low_rank(matrix, 16), low_rank(matrix, 16)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(low_rank(matrix, 16, seed=1).basis, first.basis)


def test_a_warm_start_needs_fewer_products(monkeypatch):
    matrix = matrix_of(512, 512, 0.5)
    cold = low_rank(matrix, 32)
    calls = []
    qr = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda *a: (calls.append(1), qr(*a))[1])
    near = matrix + 1e-3 * matrix_of(512, 512, 0, seed=1) / 512**0.5
    warm = low_rank(near, 32, basis=cold.basis)
    assert len(calls) <= 4
    values = torch.linalg.svdvals(near.double())
    off = (near - (warm.left * warm.values) @ warm.right.T).norm()
    assert off <= 1.007 * values[32:].square().sum().sqrt()
