"""A plain PEFT LoRA folder as a plan: which base tensor it changes, and how.

Formulas and conventions are PEFT 0.21.2's: `tuners/lora/layer.py` (scaling), `tuners/lora/model.py` (patterns),
`tuners/lora/dora.py` (DoRA's norm is taken per output feature).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_cli.errors import UserError
from qlora_cli.model.adapter import WEIGHTS
from qlora_cli.model.added_tokens import ROWS, trained_rows
from qlora_cli.model.continued import CONFIG
from qlora_cli.model.layout import Layout
from qlora_cli.model.safetensors_stream import read_entries, read_tensor

PREFIX = "base_model.model."
LORA_A, LORA_B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"

UNDERSTOOD = frozenset(
    """alpha_pattern auto_mapping base_model_name_or_path bias exclude_modules fan_in_fan_out inference_mode
    init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout megatron_core
    modules_to_save peft_type peft_version qalora_group_size r rank_pattern revision target_modules task_type
    trainable_token_indices use_dora use_rslora""".split()  # noqa: SIM905
)
"""Keys of adapter_config.json whose meaning is in this file, or that do not bear on a merge. Any other that is set
names a variant of LoRA with other arithmetic."""
NAMING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
"""Keys of it that say which modules have factors."""
STARTS = (True, False, "gaussian")
"""`init_lora_weights` that leave the base as it is. The others (pissa, loftq, ...) go with a changed base."""


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that has been checked but not loaded."""

    folder: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @property
    def weights(self) -> Path:
        """The file of its tensors."""
        return self.folder / WEIGHTS

    def tensor(self, name: str) -> Tensor:
        """One of its tensors in float32."""
        return read_tensor(self.weights, name).float()


@dataclass(frozen=True)
class LowRank:
    """W + scaling * B @ A, with each row brought to `magnitude` where there is one (DoRA).

    transposed: the base stores W as (in_features, out_features), as GPT-2's Conv1D does.
    """

    module: str
    scaling: float
    magnitude: bool
    transposed: bool


@dataclass(frozen=True)
class Replacement:
    """A tensor trained in full (`modules_to_save`)."""

    name: str


@dataclass(frozen=True)
class Rows:
    """Rows of an embedding or a head, trained in full (`trainable_token_indices`), some of them behind the base's last.

    ids: where the tensor's rows belong. number: rows of the merged weight.
    """

    name: str
    ids: tuple[int, ...]
    number: int


Update = LowRank | Replacement | Rows


def read_adapter(folder: Path) -> Adapter:
    """Check an adapter folder. Raises UserError for one that is missing, damaged, or not LoRA as we know it."""
    file = folder / CONFIG
    if not file.is_file():
        raise UserError(folder, f"no {CONFIG}", "name the adapter folder of a run")
    try:
        config = json.loads(file.read_bytes())
        peft_type = config["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(file, "damaged: no JSON with a peft_type", "copy the adapter folder again") from error
    if peft_type != "LORA":
        raise UserError(file, f"merging peft_type {peft_type!r} is not available yet", "use the adapter unmerged")
    for name, value in config.items():
        if (value and name not in UNDERSTOOD) or (name == "bias" and value != "none"):
            raise UserError(file, f"merging with {name}: {value!r} is not available yet", "use the adapter unmerged")
    if (start := config.get("init_lora_weights", True)) not in STARTS:
        raise UserError(
            file,
            f"init_lora_weights: {start!r} changed the base, and merging onto a changed base is not available yet",
            "use the adapter unmerged",
        )
    entries = read_entries(folder / WEIGHTS)
    return Adapter(folder, config, {entry.name: entry.shape for entry in entries})


def plan_updates(adapter: Adapter, base: Mapping[str, tuple[int, ...]], layout: Layout) -> dict[str, Update]:
    """What the adapter does to each base tensor (live names and stored shapes), using each of its tensors once.

    Raises UserError for tensors that fit nothing in the base, wrong shapes, and modules without their tensors.
    """
    left = set(adapter.shapes)
    updates: dict[str, Update] = {}
    for key in sorted(adapter.shapes):
        name = key.removeprefix(PREFIX)
        if key.endswith(ROWS) and name.removesuffix(ROWS) + ".weight" in layout.parameters:
            left.remove(key)
            updates |= _rows(adapter, name.removesuffix(ROWS), base, layout)
        elif key.endswith(LORA_A) and name.removesuffix(LORA_A) + ".weight" in base:
            module = name.removesuffix(LORA_A)
            parts = {PREFIX + module + part for part in (LORA_A, LORA_B, *([MAGNITUDE] if _dora(adapter) else []))}
            if parts <= left:
                left -= parts
                updates[module + ".weight"] = _low_rank(adapter, module, base[module + ".weight"], layout)
        elif key.startswith(PREFIX) and name in base and name not in updates:
            left.remove(key)
            _check_shape(adapter, key, base[name])
            updates[name] = Replacement(key)
    if left:
        some = ", ".join(sorted(left)[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        what = f"no place in the base, or no other half, for {some}"
        raise UserError(adapter.weights, what, "name the base this adapter was trained on")
    _refuse_missing(adapter, updates, layout)
    return updates


def _rows(adapter: Adapter, module: str, base: Mapping[str, tuple[int, ...]], layout: Layout) -> dict[str, Update]:
    """The rows of one module, and of the weights that are tied to it and stored too.

    Raises UserError for rows that leave a gap behind the base's last, or that the adapter changes in another way too,
    and for a head with a bias, which would have none for them.
    """
    key = PREFIX + module + ROWS
    ids = trained_rows(adapter.config.get("trainable_token_indices"), module, layout.embeddings)
    sharing = layout.embeddings if module in layout.embeddings else {module}
    updates: dict[str, Update] = {}
    for name in sorted(f"{one}.weight" for one in sharing):
        others = [one for one in adapter.shapes if one.startswith(PREFIX + name.removesuffix("weight")) and one != key]
        others = [one for one in others if not (one.endswith(ROWS) and adapter.tensor(one).equal(adapter.tensor(key)))]
        if ids is None or others:
            what = f"{key} beside {others[0]}" if others else f"{key}, whose tokens {CONFIG} does not name"
            raise UserError(adapter.folder, what, "name an adapter that `qlora train` wrote")
        if name not in base:
            continue
        number, width = base[name]
        _check_shape(adapter, key, (len(ids), width))
        grown = max(number, max(ids) + 1)
        if not set(range(number, grown)) <= set(ids):
            what = f"{key} is of the tokens {ids[0]} to {ids[-1]}, and the base's last is {number - 1}"
            raise UserError(adapter.folder, what, "name the base this adapter was trained on")
        if name.removesuffix("weight") + "bias" in layout.parameters:
            what = f"merging rows of {name}, which has a bias, is not available yet"
            raise UserError(adapter.folder, what, "use the adapter unmerged")
        updates[name] = Rows(key, tuple(ids), grown)
    return updates


def _refuse_missing(adapter: Adapter, updates: Mapping[str, Update], layout: Layout) -> None:
    """Every module that adapter_config.json names has to have been used: PEFT only warns of one that has no tensors."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    known = {name: value for name, value in adapter.config.items() if name in NAMING}
    config = LoraConfig(**known)
    saved = adapter.config.get("modules_to_save") or []
    rows = adapter.config.get("trainable_token_indices")
    shared = layout.embeddings if any(f"{module}.weight" in updates for module in layout.embeddings) else ()
    for name in sorted(layout.parameters):
        module, _, part = name.rpartition(".")
        wanted = any(module == one or module.endswith(f".{one}") for one in saved)
        wanted = wanted or (trained_rows(rows, module, layout.embeddings) is not None and module not in shared)
        if part == "weight" and module in layout.linear and config.target_modules != "all-linear":
            wanted = wanted or bool(check_target_module_exists(config, module))
        if wanted and name not in updates:
            what = f"{CONFIG} has the adapter change {module}, and no tensor of {WEIGHTS} does"
            raise UserError(adapter.folder, what, "copy the adapter folder again")


def _dora(adapter: Adapter) -> bool:
    return bool(adapter.config.get("use_dora"))


def _low_rank(adapter: Adapter, module: str, stored: tuple[int, ...], layout: Layout) -> LowRank:
    """The update of one linear module, with its rank and alpha resolved by PEFT's own pattern function."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = adapter.config.get("rank_pattern") or {}, adapter.config.get("alpha_pattern") or {}
    r = ranks.get(get_pattern_key(ranks.keys(), module), adapter.config["r"])
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), adapter.config["lora_alpha"])
    transposed = module in layout.conv1d
    out_features, in_features = reversed(stored) if transposed else stored
    _check_shape(adapter, PREFIX + module + LORA_A, (r, in_features))
    _check_shape(adapter, PREFIX + module + LORA_B, (out_features, r))
    if _dora(adapter):
        _check_shape(adapter, PREFIX + module + MAGNITUDE, (out_features,))
    scaling = alpha / math.sqrt(r) if adapter.config.get("use_rslora") else alpha / r
    return LowRank(module, scaling, _dora(adapter), transposed)


def _check_shape(adapter: Adapter, key: str, expected: tuple[int, ...]) -> None:
    if adapter.shapes[key] != expected:
        raise UserError(
            adapter.weights,
            f"{key} has shape {list(adapter.shapes[key])}, but base and adapter_config.json ask for {list(expected)}",
            "name the base this adapter was trained on",
        )
