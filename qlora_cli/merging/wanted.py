"""What `qlora merge` was asked for, and where its results go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_cli.merge.merge import Base as Onto
from qlora_cli.train.run import Run

Stored = Literal["nf4", "fp4", "int4", "nf2", "int2"]
"""Data types in which a merged model can be written."""


@dataclass(frozen=True)
class Wanted:
    """What `qlora merge` was asked for.

    out: None for RUN/merged. bases: what is merged onto, each into a folder of its own.
    dtype: None for the run's compute dtype. quantize: the data type in which the merged model is written too.
    verify: whether there is a certificate. max_kl: its limit, None for that of the dtype. rows: held-out rows for it,
    None for as many as MOST_ROWS and MOST_TOKENS allow. other_base: whether a base that differs from the one trained on
    is merged onto.
    """

    out: Path | None = None
    bases: Sequence[Onto] = ("dequantized",)
    dtype: str | None = None
    quantize: Stored | None = None
    verify: bool = True
    max_kl: float | None = None
    rows: int | None = None
    other_base: bool = False


def places(run: Run, wanted: Wanted) -> dict[Onto, Path]:
    """Where each merge goes: RUN/merged or --out, and of several each but the first with its base's name behind."""
    first = wanted.out or run.folder / "merged"
    if first.name in ("", ".."):  # which nothing can be put behind
        first = first.resolve()
    return {onto: first if at == 0 else first.with_name(f"{first.name}-{onto}") for at, onto in enumerate(wanted.bases)}


def quantized_place(out: Path, wanted: Wanted) -> Path:
    """Where a merged model is written quantised."""
    return out.with_name(f"{out.name}-{wanted.quantize}")
