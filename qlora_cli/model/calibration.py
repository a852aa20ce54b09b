"""What a layer is fed: the second moment of its inputs over rows of training data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_cli.errors import UserError

MOST_BYTES = 2 * 10**9
"""Of second moments that are gathered in one pass over the rows; a larger model takes several passes."""

DAMPING = 1e-3
"""Added to the diagonal, in units of its mean: the rows need not span all inputs."""


def portions(model: nn.Module, names: Sequence[str]) -> Iterator[list[str]]:
    """The linear modules of these names, in portions whose second moments take MOST_BYTES at most, or one module."""
    portion: list[str] = []
    size = 0
    for name in names:
        moment = 4 * in_features(model.get_submodule(name)) ** 2
        if portion and size + moment > MOST_BYTES:
            yield portion
            portion, size = [], 0
        portion.append(name)
        size += moment
    if portion:
        yield portion


def in_features(module: nn.Module) -> int:
    """Of a linear layer, GPT-2's among them."""
    assert isinstance(module.weight, Tensor)
    return module.weight.shape[0 if isinstance(module, Conv1D) else 1]


@torch.no_grad()
def second_moments(model: Any, names: Sequence[str], rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """E[x xᵀ] (in, in) fp32 of the inputs x of each module, over all tokens of the rows; each row goes through alone.

    Modules that are fed one tensor share one moment; a module that no row reaches has none.
    """
    sums: dict[str, Tensor] = {}
    heard = _Heard(sums)
    with ExitStack() as hooks:
        for name in names:
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(heard.by(name)).remove)
        for row in rows:
            model(input_ids=torch.tensor([list(row)], device=model.device), use_cache=False)
    tokens = sum(len(row) for row in rows)
    means = {name: total / tokens for name, total in sums.items()}
    return {name: means[heard.first[name]] for name in names if name in heard.first}


class _Heard:
    """Sums x xᵀ of what modules are fed; `first`: by module, the one that was fed the same tensor before it."""

    def __init__(self, sums: dict[str, Tensor]) -> None:
        self.sums, self.first = sums, dict[str, str]()
        self.last: tuple[str, Any] = ("", None)

    def by(self, name: str) -> Callable[[nn.Module, Any], None]:
        """The hook of a module."""

        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self.last[1] is not inputs[0]:
                self.last = (name, inputs[0])
                x = inputs[0].flatten(0, -2).float()
                self.sums[name] = self.sums[name].addmm_(x.T, x) if name in self.sums else x.T @ x
            self.first[name] = self.last[0]

        return hook


def square_root(moment: Tensor, module: str) -> Tensor:
    """A lower triangular L (in, in) fp32 with L Lᵀ = the moment, damped: tenfold until fp32's rounding is covered.

    Raises UserError for inputs that were not finite.
    """
    if not moment.isfinite().all():
        what = f"the inputs of {module} are not finite over the calibration rows"
        raise UserError("adapter.loftq.calibration", what, "set quantization.compute_dtype: float32, or leave it out")
    damped = moment.double()
    mean = float(damped.diagonal().mean())
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        damped.diagonal().add_(damping * mean + torch.finfo(torch.float32).tiny)
        root, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return root.float()
    raise AssertionError("a second moment, damped by its own mean, has a root")
