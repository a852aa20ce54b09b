"""A merged model whose vocabulary is larger than its base's: what has a size by it, beside the trained rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_cli.errors import UserError
from qlora_cli.merge.adapter_delta import Adapter, Rows, Update
from qlora_cli.model.layout import Layout
from qlora_cli.model.ordinary import Ordinary
from qlora_cli.model.safetensors_stream import Checkpoint

BIASES = "final_logits_bias"
"""BART's buffer (1, V), added to its logits: a token that it did not know has none."""


def vocabulary(
    updates: Mapping[str, Update], base: Mapping[str, tuple[int, ...]], layout: Layout, adapter: Adapter
) -> int | None:
    """The tokens of the merged model; None where they are as many as the base's.

    base: stored shapes by live name. Raises UserError where the embedding and the head would differ.
    """
    grown = {name: one.number for name, one in updates.items() if isinstance(one, Rows) and one.number > base[name][0]}
    if not grown:
        return None
    sized = {f"{module}.weight" for module in (*layout.embeddings, layout.head) if module} & base.keys()
    if short := sorted(sized - grown.keys()):
        what = f"the adapter has rows for tokens behind the base's last, and none of {short[0]}"
        raise UserError(adapter.folder, what, "name an adapter that `qlora train` wrote")
    return next(iter(grown.values()))


def with_room(source: Ordinary, number: int | None, layout: Layout) -> Ordinary:
    """The base's checkpoint with a bias of zero for each token that it does not know; mostly as it is."""
    names = {name for name in source.checkpoint.entries() if layout.live(name) == BIASES}
    if number is None or not names:
        return source
    shards = {
        shard: [replace(entry, shape=(1, number)) if entry.name in names else entry for entry in entries]
        for shard, entries in source.checkpoint.shards.items()
    }

    def read(path: Path, name: str) -> Tensor:
        found = source.read(path, name)
        if name not in names:
            return found
        return torch.cat([found, found.new_zeros(1, number - found.shape[1])], dim=1)

    return replace(source, checkpoint=Checkpoint(source.checkpoint.folder, shards), read=read)


def keys_of_vocabulary(number: int | None, layout: Layout, base: Path) -> dict[str, Any]:
    """What config.json says of a larger vocabulary, at the place where the base's has it."""
    if number is None:
        return {}
    stored, text = json.loads((base / "config.json").read_bytes()), layout.config.get_text_config()
    key = text.attribute_map.get("vocab_size", "vocab_size")
    parts = {name: part for name, part in stored.items() if isinstance(part, dict) and key in part}
    return {name: part | {key: number} for name, part in parts.items()} or {key: number}
