"""The adapter that a recipe ends up with: its own keys, or those of the adapter that `adapter.from` continues."""

from __future__ import annotations

from pathlib import Path

from qlora_cli.model.source import read_json
from qlora_cli.recipe.schema import Adapter

CONFIG = "adapter_config.json"

NAMES = {
    "r": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "target_modules": "target_modules",
    "modules_to_save": "modules_to_save",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}
"""Keys of a recipe's adapter to those of PEFT's config."""


def as_continued(adapter: Adapter) -> Adapter:
    """The adapter's section with what the continued adapter's own config says; the same where none is continued.

    And where that is gone, which a run that has begun does not need any more.
    """
    if adapter.from_ is None or not (path := Path(adapter.from_) / CONFIG).is_file():
        return adapter
    known = read_json(path, "a PEFT adapter folder needs it")
    changes = {ours: known[theirs] for ours, theirs in NAMES.items() if known.get(theirs) is not None}
    return adapter.model_copy(update={**changes, "from_": None})
