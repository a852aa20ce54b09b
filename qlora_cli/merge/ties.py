"""Tied weights of which an adapter changes one side: each side gets a tensor of its own, and config.json says so.

One stored tensor serves the embedding and the head. PEFT trains a copy or an addition of one of them, so that they
differ from then on (peft#2777), and no single merged value is right for both.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from qlora_cli.merge.adapter_delta import PREFIX, ROWS, Adapter
from qlora_cli.model.layout import Layout
from qlora_cli.model.ordinary import Ordinary
from qlora_cli.model.safetensors_stream import Checkpoint


def changed_ties(adapter: Adapter, layout: Layout) -> frozenset[str]:
    """The tied modules of a group that the adapter changes a member of; none where ties can stay, as under trained rows
    of the embedding, which all have."""
    whole = [key for key in adapter.shapes if not key.endswith(ROWS)]
    touched = {module for module in layout.tied for key in whole if key.startswith(f"{PREFIX}{module}.")}
    return layout.tied if touched else frozenset()


def untied(source: Ordinary, modules: frozenset[str], layout: Layout) -> Ordinary:
    """The base's checkpoint with a tensor for each of the tied modules, the copies beside the one that is stored."""
    if not modules:
        return source
    weights = {f"{module}.weight" for module in modules}
    shards = source.checkpoint.shards
    stored = {
        full: (shard, entry)
        for shard, entries in shards.items()
        for entry in entries
        if (full := layout.parameter(entry.name)) in weights
    }
    head = f"{layout.head}.weight"  # it may be stored too, and the others are copies of the embedding
    shard, entry = next((found for name, found in stored.items() if name != head), next(iter(stored.values())))
    copies = [replace(entry, name=name) for name in sorted(weights - stored.keys())]
    known = {copy.name for copy in copies}

    def read(path: Path, name: str) -> Tensor:
        return source.read(path, entry.name if name in known else name)

    changed = {**shards, shard: [*shards[shard], *copies]}
    return replace(source, checkpoint=Checkpoint(source.checkpoint.folder, changed), read=read)


def scales(modules: frozenset[str], layout: Layout) -> dict[str, float]:
    """What a weight that was tied has to be multiplied by once it is not, by its name; mostly nothing.

    T5 multiplies the logits of a tied head by d_model ** -0.5 (`scale_decoder_outputs` of transformers 5.23), and reads
    a config.json with `tie_word_embeddings: false` as one that does not.
    """
    scaled = getattr(layout.config, "scale_decoder_outputs", False) and layout.head in modules
    return {f"{layout.head}.weight": layout.config.d_model**-0.5} if scaled else {}


def keys_of_untied(scaled: dict[str, float]) -> dict[str, bool]:
    """What config.json says of weights that are not tied any more. scaled: what `scales` gives."""
    return {"tie_word_embeddings": False} | ({"scale_decoder_outputs": False} if scaled else {})
