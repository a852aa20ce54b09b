"""The recipe of a command that is given a model instead of one: what `--set` may say there, and nothing idle."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from qlora_cli.errors import UserError, UserErrors
from qlora_cli.recipe.fields import choices, type_at
from qlora_cli.recipe.load import recipe_of
from qlora_cli.recipe.located_yaml import Located, Place
from qlora_cli.recipe.rules import STORES_ITS_BASE
from qlora_cli.recipe.schema import Recipe

DATA_TYPES = tuple(str(name) for name in choices(type_at(("quantization", "data_type"))) if name != "none")
"""Every data type that quantises."""

KEYS = {
    "model": ("revision", "trust_remote_code", "task", "num_labels"),
    "quantization": ("double_quant", "block_size", "compute_dtype", "skip_modules", "zero_point", "clip"),
    "data": ("eval", "chat_template", "chat_template_kwargs", "train_on", "on_bad_row", "on_long_row", "workers"),
}
"""What `--set` may change, by section; those of data where there are rows."""


def recipe_of_model(
    model: str, data_types: Sequence[str], rows: dict[str, Any] | None = None, overrides: Sequence[str] = ()
) -> Recipe:
    """A recipe that trains nothing: the model, and perhaps rows to measure it on, a source of data.eval.

    Its data type is the first of those on which every override has an effect. Long rows are truncated.
    Raises UserError for a name that is no data type, for overrides that do nothing here, and as load_recipe does.
    """
    for data_type in data_types:
        recipe_of(*_values(model, data_type, rows))
    for text in overrides:
        _refuse_idle(text, KEYS if rows else {name: KEYS[name] for name in ("model", "quantization")})
    refused: list[UserError] = []
    for data_type in data_types:
        try:
            return recipe_of(*_values(model, data_type, rows), overrides)
        except UserErrors as error:
            refused.append(error)
    raise refused[0]


def recipe_to_quantize(model: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe that trains nothing: the model and how it is quantised, as the overrides say.

    Raises UserError for an override that has nothing to do with what is stored, and as load_recipe does.
    """
    values: dict[str, Any] = {"model": {"name_or_path": model}, "data": {"train": [{"path": os.devnull}]}}
    recipe = recipe_of(values, Located("MODEL", 1, values={("model",): Place(1, 1, 1, "MODEL")}), overrides)
    started, calibrated = recipe.adapter.init in STORES_ITS_BASE, bool(recipe.adapter.loftq.calibration)
    counts = {"model": True, "quantization": True, "adapter": started, "training.seed": started, "data": calibrated}
    for text in overrides:
        if not any(counts[name] for name in counts if text.strip().startswith(name)):
            known = ", ".join(name for name, does in counts.items() if does)
            raise UserError(f"--set {text}", "changes nothing in what is stored", f"what counts here is {known}")
    if calibrated and recipe.data.train[0].path == os.devnull:
        todo = "--set 'data.train=[{path: rows.jsonl}]'"
        raise UserError("adapter.loftq.calibration", "there are no rows to calibrate on", todo)
    return recipe


def _values(model: str, data_type: str, rows: dict[str, Any] | None) -> tuple[dict[str, Any], Located]:
    """Plain values and where they were given."""
    values = {
        "model": {"name_or_path": model},
        "quantization": {"data_type": data_type},
        "data": {"train": [{"path": os.devnull}], "eval": [rows] if rows else [], "on_long_row": "truncate"},
    }
    places = {("model",): "MODEL", ("quantization",): "--types", ("data",): "--data"}
    return values, Located("MODEL", 1, values={path: Place(1, 1, 1, name) for path, name in places.items()})


def _refuse_idle(text: str, keys: dict[str, tuple[str, ...]]) -> None:
    """Raises UserError for an override of a key that changes nothing here."""
    section, key = (*re.split(r"[.\[=]", text.strip(), maxsplit=2), "", "")[:2]
    if key not in keys.get(section, ()):
        known = "; ".join(f"{name}: {', '.join(inner)}" for name, inner in keys.items())
        raise UserError(f"--set {text}", "sets nothing that counts here", f"what may be set is {known}")
