"""Rotary embeddings that follow the longest row of a batch, which must not change what another row is told."""

from __future__ import annotations

from typing import Any


def rope_boundaries(config: Any) -> tuple[int, ...]:
    """Lengths in tokens at which a longrope embedding goes over to other frequencies, ascending; mostly none.

    transformers 5.23 (modeling_rope_utils.py, longrope_frequency_update) chooses one set of them for the whole batch,
    by its longest row, so rows on two sides of a boundary cannot share one. `dynamic` changes beyond the model's
    context alone, where no row is.
    """
    rope: dict[str, Any] = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return tuple(
        sorted({kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"})
    )
