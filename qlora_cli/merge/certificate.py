"""The certificate of a merge: how far what is served is from what was trained, and whether that is near enough."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from qlora_cli.merge.difference import Difference, Seen, compare

LIMITS = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 5e-3}
"""The mean KL, in nats per position, that rounding to a dtype may cost: of the run's compute dtype and of the one that
is written the coarser decides. Measured on random models, the hard case: 1.5e-13, 5.6e-7, 5.2e-4 (docs/merge.md)."""

INT8 = 5e-2
"""Of an int8 base, whose layers quantise what they multiply with when they are evaluated, and a merged one's do not."""

ORIGINAL = 0.1
"""Onto weights that the adapter never saw: the merged model is another one by what quantisation cost."""

Manner = Literal["whole", "streamed"]
"""How the merged model was run: in memory, or a layer at a time from the disk."""


@dataclass(frozen=True)
class Certificate:
    """Unmerged against merged over the same rows; `to_json` is what merge.json and the model card have.

    rows: number of them, from `data`, a role of the recipe. loss_unmerged, loss_merged: nats per target.
    limit: of difference.mean_kl; None where what it costs is asked for, and not whether it is little; then nothing
    holds or does not. default_limit: that of the data types, where nobody asks for another.
    """

    difference: Difference
    loss_unmerged: float
    loss_merged: float
    limit: float | None
    default_limit: float | None
    rows: int
    data: str
    manner: Manner

    @property
    def held(self) -> bool | None:
        """Whether the merged model is near enough."""
        return None if self.limit is None else self.difference.mean_kl <= self.limit

    def to_json(self) -> dict[str, Any]:
        """A flat object."""
        fields = {name: value for name, value in vars(self).items() if name != "difference"}
        return {"held": self.held, **asdict(self.difference), **fields}


def limit_of(compute_dtype: str, dtype: str, onto: str, data_type: str) -> float:
    """The limit of a merge by what its rounding may cost; dtypes as in LIMITS, data_type of the recipe."""
    limits = [LIMITS[compute_dtype], LIMITS[dtype]]
    if onto == "original":
        limits.append(ORIGINAL)
    if data_type == "int8":
        limits.append(INT8)
    return max(limits)


Limits = tuple[float | None, float | None]
"""The limit that is applied, and that of the data types."""


def certify(unmerged: Seen, merged: Seen, limits: Limits, rows: tuple[int, str], manner: Manner) -> Certificate:
    """Compares what both models say. Raises UserError (exit code FAILED) where the merged one's logits are not finite.

    rows: their number, and what they are.
    """
    difference = compare(unmerged.logits, merged.logits)
    return Certificate(difference, unmerged.loss, merged.loss, *limits, *rows, manner)
