"""Loss and gradient norm of every step: summed up for the next logged line, refused where they are no numbers.

A GPU is never waited for before it has the next step's passes to compute: until then a step's numbers are on their way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_cli.data.encode import Example
from qlora_cli.data.order import Window
from qlora_cli.errors import Exit, UserError


class OnTheWay(NamedTuple):
    """A step whose numbers the device still computes. numbers: loss, gradient norm, once `arrived` has happened."""

    window: Window[Example]
    num_tokens: int
    numbers: Tensor
    arrived: torch.cuda.Event | None


@dataclass
class Losses:
    """What the steps since the last logged line come to.

    sums: of losses and tokens, and the last gradient norm, as a checkpoint keeps them.
    late: read a step's numbers with the next step; else at once, before its gradient is applied.
    """

    sums: dict[str, float]
    late: bool
    coming: OnTheWay | None = None

    def add(self, window: Window[Example], num_tokens: int, loss: Tensor, grad_norm: Tensor) -> None:
        """One more step: its mean loss over `num_tokens` and its gradient norm, both () tensors.

        Raises UserError where those of this step, or if `late` of the one before, are not finite.
        """
        numbers, arrived = on_host(torch.stack([loss.detach().float(), grad_norm.float()]))
        self.read()
        self.coming = OnTheWay(window, num_tokens, numbers, arrived)
        if not self.late:
            self.read()

    def read(self) -> None:
        """Waits for what is on its way: before anything is logged, measured or saved.

        Raises UserError where it is not finite: nothing that such a step touched is ever written.
        """
        if self.coming is None:
            return
        (window, num_tokens, numbers, arrived), self.coming = self.coming, None
        if arrived is not None:
            arrived.synchronize()
        loss, grad_norm = numbers.tolist()
        refuse_nonfinite(window, loss, grad_norm)
        self.sums["loss"] += loss * num_tokens
        self.sums["tokens"] += num_tokens
        self.sums["grad_norm"] = grad_norm

    def start_anew(self) -> None:
        """After a logged line."""
        self.sums = no_losses()


def no_losses() -> dict[str, float]:
    """The sums over no step."""
    return {"loss": 0.0, "tokens": 0.0}


def on_host(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A tensor in host memory, and when it is there: None where it is at once."""
    if not numbers.is_cuda:
        return numbers, None
    copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True).copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(numbers.device))
    return copy, arrived


def refuse_nonfinite(window: Window[Example], loss: float, grad_norm: float) -> None:
    """Stops the run at a step that would put NaN or infinity into the adapter."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    places = ", ".join(row.where for row in window.rows[:4])
    raise UserError(
        f"step {window.step + 1}",
        f"loss {loss:g} and gradient norm {grad_norm:g} (rows {places}, ...)",
        "lower training.learning_rate or look at these rows; the last checkpoint is untouched",
        Exit.FAILED,
    )
