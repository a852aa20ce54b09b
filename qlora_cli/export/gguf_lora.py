"""A LoRA adapter as GGUF: what `llama-cli --lora` and Ollama's ADAPTER load beside the base.

llama.cpp computes W + alpha / rank * B @ A, with one alpha for the file and the rank of each pair; any other scaling
(rsLoRA, patterns) is folded into B.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qlora_cli.errors import UserError
from qlora_cli.export.gguf_architectures import Architecture, Fields, architecture_of, head_dim, load_config
from qlora_cli.export.gguf_file import Planned
from qlora_cli.export.gguf_tensors import heads_of, interleaved, name_map
from qlora_cli.model.owner import OWNER
from qlora_cli.model.safetensors_stream import Entry, read_entries, read_tensor
from qlora_cli.model.source import read_json

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType as Type

LORA_TYPES = ("f32", "f16", "bf16")
PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
MERGE = "merge it and export the merged model"

_PAIR = re.compile(r"(.+)\.lora_(A|B)\.weight")


@dataclass(frozen=True)
class Pair:
    """One module's A (r, in_features) and B (out_features, r), and the factor that B takes in."""

    module: str
    a: Entry
    b: Entry
    factor: float


@dataclass(frozen=True)
class Lora:
    """An adapter that GGUF can express."""

    folder: Path
    alpha: float
    pairs: list[Pair]


def read_lora(folder: Path) -> Lora:
    """An adapter folder. Raises UserError for what the format has no place for, with what to do."""
    path = folder / "adapter_config.json"
    config = read_json(path, "it says what the adapter is")
    if reason := _inexpressible(folder, config):
        raise UserError(path, f"a GGUF adapter cannot express {reason}", MERGE)
    entries: dict[str, dict[str, Entry]] = {}
    for entry in read_entries(folder / WEIGHTS):
        if entry.name.endswith(".base_layer.weight"):
            continue  # PEFT saves the frozen weight of a head or an embedding that has a LoRA
        found = _PAIR.fullmatch(entry.name.removeprefix(PREFIX))
        if not found:
            raise UserError(folder / WEIGHTS, f"a GGUF adapter has no place for tensor {entry.name}", MERGE)
        entries.setdefault(found[1], {})[found[2]] = entry
    pairs = []
    for module, sides in entries.items():
        if set(sides) != {"A", "B"} or sides["A"].shape[0] != sides["B"].shape[1]:
            raise UserError(folder / WEIGHTS, f"A and B of {module} do not fit each other", "copy the adapter again")
        pairs.append(Pair(module, sides["A"], sides["B"], _factor(config, module, sides["A"].shape[0])))
    if not pairs:
        raise UserError(folder / WEIGHTS, "there is no LoRA in it", "name the adapter folder of a run")
    return Lora(folder, float(config["lora_alpha"]), pairs)


def plan_lora(lora: Lora, base: Path, file_type: str | None = None) -> tuple[Architecture, list[Planned]]:
    """The tensors of the file and the base's architecture.

    Raises UserError for modules that the base's graph has not, or shapes that do not fit its config.json.
    """
    from gguf import GGMLQuantizationType as Type

    arch = architecture_of(base)
    config = load_config(base)
    to_name = name_map(arch, config.num_hidden_layers)
    tied = arch.head_is_embedding or config.tie_word_embeddings
    planned: list[Planned] = []
    for pair in sorted(lora.pairs, key=lambda pair: pair.module):
        name = to_name(pair.module + ".weight")
        if name is None or name == "token_embd.weight" or (tied and name == "output.weight"):
            what = f"llama.cpp adds no LoRA to {pair.module} of this base"
            raise UserError(lora.folder / WEIGHTS, what, MERGE)
        if pair.a.shape[1] != _inputs(name, config) or pair.b.shape[0] % (heads_of(name, config) or 1):
            what = f"{pair.module} is {pair.b.shape[0]} x {pair.a.shape[1]}, which does not fit {base}"
            raise UserError(lora.folder / WEIGHTS, what, "name the base that this adapter was trained on")
        for side, entry in (("a", pair.a), ("b", pair.b)):
            load = partial(_load, lora, pair, side, arch, heads_of(name, config))
            kind: Type = Type[(file_type or "f32").upper()]
            planned.append(Planned(f"{name}.lora_{side}", entry.shape, kind, load))
    return arch, planned


def lora_fields(lora: Lora) -> Fields:
    """The keys of an adapter file besides its architecture."""
    return {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": lora.alpha}


def _load(lora: Lora, pair: Pair, side: str, arch: Architecture, heads: int | None) -> Tensor:
    entry = pair.a if side == "a" else pair.b
    tensor = read_tensor(lora.folder / WEIGHTS, entry.name)
    if side == "a":
        return tensor
    if arch.permuted and heads:
        tensor = interleaved(tensor, heads)
    return tensor if pair.factor == 1.0 else tensor.float() * pair.factor


def _inexpressible(folder: Path, config: dict[str, Any]) -> str:
    """What of the adapter has no place in the format, "" where all of it has."""
    if (kind := config.get("peft_type")) != "LORA":
        return f"peft_type {kind!r}"
    if config.get("use_dora"):
        return "DoRA: the norm of each row depends on the base's weight"
    if saved := config.get("modules_to_save"):
        return f"modules_to_save ({', '.join(saved)}): they are trained in full"
    if (folder / OWNER).is_file() or (start := config.get("init_lora_weights", True)) not in (True, False, "gaussian"):
        called = "LoftQ or PiSSA" if (folder / OWNER).is_file() else repr(start)
        return f"a start that changed the base ({called}): it belongs to that base alone"
    known = ("bias", "none"), ("fan_in_fan_out", False)
    for key, usual in known:
        if config.get(key, usual) not in (usual, None):
            return f"{key}: {json.dumps(config[key])}"
    others = (
        "lora_bias",
        "alora_invocation_tokens",
        "trainable_token_indices",
        "target_parameters",
        "layer_replication",
    )
    return next((key for key in others if config.get(key)), "")


def _factor(config: dict[str, Any], module: str, rank: int) -> float:
    """PEFT's scaling of a module over llama.cpp's, with alpha and rank resolved by PEFT's own pattern function."""
    from peft.utils.other import get_pattern_key

    alphas: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), module), config["lora_alpha"])
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return scaling / (config["lora_alpha"] / rank)


def _inputs(name: str, config: Any) -> int:
    """Features that a module takes in."""
    if ".attn_output." in name:
        return config.num_attention_heads * head_dim(config)
    return int(config.intermediate_size if ".ffn_down." in name else config.hidden_size)
