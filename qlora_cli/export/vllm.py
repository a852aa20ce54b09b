"""A folder that vLLM serves as it is, with the command in serve.sh: the whole model, or a LoRA adapter for its base."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_cli.errors import Exit, UserError
from qlora_cli.export.peft_folder import is_hub_id, named_base, write_adapter
from qlora_cli.export.source import (
    MODEL_FILES,
    Facts,
    Order,
    Source,
    context_of,
    files_of,
    hand_on,
    refuse_place,
    task_of,
)
from qlora_cli.model.continued import CONFIG
from qlora_cli.model.owner import OWNER
from qlora_cli.model.prequantized import method_of
from qlora_cli.model.source import check_weights, read_config, read_json
from qlora_cli.model.whole_folder import publish_new
from qlora_cli.quant.data_types import QUANT_METHOD

MERGE = "run `qlora merge` and export the merged model with --to vllm"

TASKS: dict[str, tuple[str, ...]] = {"causal_lm": (), "sequence_classification": ("--runner", "pooling")}
"""Tasks that vLLM serves, and what its command line needs for them (docs.vllm.ai, pooling models, 0.11 to 0.18)."""

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that --max-lora-rank takes (vllm/config/lora.py, MaxLoRARanks)."""

CANNOT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "use_dora": (bool, "DoRA, which vLLM does not have"),
    "modules_to_save": (bool, "layers trained in full, which vLLM does not load"),
    "bias": (lambda bias: bias != "none", "trained biases, which vLLM does not load"),
    "lora_bias": (bool, "trained biases, which vLLM does not load"),
    "rank_pattern": (bool, "ranks of single layers, which vLLM would scale wrongly"),
    "alpha_pattern": (bool, "scalings of single layers, which vLLM ignores"),
    "trainable_token_indices": (bool, "trained tokens, which vLLM does not load"),
    "target_parameters": (bool, "adapters of bare parameters, which vLLM does not load"),
}
"""Keys of adapter_config.json, when they are in the way, and what the adapter has then (vllm/lora/peft_helper.py)."""

TEMPLATE = "chat_template.jinja"

SCRIPT = """#!/bin/sh
# Written by qlora. Options of `vllm serve` may follow: ./serve.sh --port 8001
cd "$(dirname "$0")" && exec {command} "$@"
"""


def write_vllm(source: Source, order: Order) -> Facts:
    """Writes the model's folder, weights as hard links where possible, and serve.sh.

    Raises UserError for a task that vLLM does not serve.
    """
    config = read_config(source.folder)
    task = task_of(config)
    if task not in TASKS:
        todo = f"serve it with transformers; vLLM serves {', '.join(TASKS)}"
        raise UserError(source.folder, f"vLLM does not serve {task}", todo)
    if method_of(config) == QUANT_METHOD:
        what = "is stored in packed layers of qlora, which vLLM does not load"
        raise UserError(source.folder, what, "export the merged model in 16 bits")
    refuse_place(order.out, source.inputs)
    check_weights(source.folder)
    context = context_of(config)
    options = ["--served-model-name", source.name, *TASKS[task], *template_options(source)]
    options += ["--max-model-len", str(context)] if context else []
    options += ["--trust-remote-code"] if config.get("auto_map") else []
    notes: list[str] = []

    def write(place: Path) -> None:
        notes.extend(hand_on(files_of(source.folder, MODEL_FILES), place, source.places))
        write_script(place, ["vllm", "serve", ".", *options])

    publish_new(order.out, write)
    command = shlex.join(["vllm", "serve", str(order.out), *options])
    return Facts({"task": task, "context": context}, notes, [command])


def write_vllm_lora(source: Source, order: Order) -> Facts:
    """Writes the adapter's folder and serve.sh.

    Raises UserError with the reason for an adapter that vLLM cannot serve.
    """
    known = read_json(source.folder / CONFIG, "a PEFT adapter folder needs it")
    refuse_unable(source.folder, known)
    refuse_place(order.out, source.inputs)
    base = named_base(source, order)
    base = os.path.abspath(base) if os.path.isdir(base) else base  # serve.sh starts elsewhere
    rank = next(rank for rank in RANKS if rank >= known["r"])
    served = ["--enable-lora", "--max-lora-rank", str(rank), *template_options(source)]
    notes: list[str] = []

    def write(place: Path) -> None:
        notes.extend(write_adapter(source, order.base_name, place))
        write_template(place)
        write_script(place, lora_command(source, base, served, place, Path()))

    publish_new(order.out, write)
    command = shlex.join(lora_command(source, base, served, order.out, order.out.absolute()))
    if not is_hub_id(base):
        notes.append(f"the base is a folder of this machine, {base}: --base-name HUB/ID names it as others find it")
    return Facts({"base": base, "rank": known["r"], "max_lora_rank": rank}, notes, [command])


def refuse_unable(adapter: Path, known: dict[str, Any]) -> None:
    """Refuses what vLLM's LoRA cannot do. known: the adapter's config."""
    if known.get("peft_type") != "LORA":
        raise UserError(adapter, f"vLLM serves LoRA, and this is {known.get('peft_type')}", MERGE)
    default = {"bias": "none"}
    for key, (in_the_way, what) in CANNOT.items():
        if in_the_way(known.get(key) or default.get(key)):
            raise UserError(adapter / CONFIG, f"{key}: the adapter has {what}", MERGE)
    if (adapter / OWNER).is_file():
        what = "its start changed the base, which is stored in packed layers of qlora that vLLM does not load"
        raise UserError(adapter, what, MERGE, Exit.USAGE)
    if known["r"] > RANKS[-1]:
        raise UserError(adapter / CONFIG, f"r is {known['r']}, and vLLM takes up to {RANKS[-1]}", MERGE)


def write_template(place: Path) -> None:
    """chat_template.jinja beside an adapter whose template is a key of its tokenizer_config.json."""
    config = place / "tokenizer_config.json"
    if (place / TEMPLATE).exists() or not config.is_file():
        return
    template = read_json(config, "it is a tokenizer's").get("chat_template")
    if isinstance(template, str):
        (place / TEMPLATE).write_text(template, encoding="utf-8")


def lora_command(source: Source, base: str, served: list[str], place: Path, called: Path) -> list[str]:
    """The command that serves the adapter in `place`, which it calls by another path.

    vLLM takes the template of the base, not of an adapter.
    """
    template = ["--chat-template", f"./{TEMPLATE}" if called == Path() else str(called / TEMPLATE)]
    options = [*served, *(template if (place / TEMPLATE).is_file() else [])]
    return ["vllm", "serve", base, *options, "--lora-modules", f"{source.name}={called}"]


def template_options(source: Source) -> list[str]:
    """The arguments of the template, which vLLM cannot know."""
    if not source.template_kwargs:
        return []
    return ["--default-chat-template-kwargs", json.dumps(source.template_kwargs, sort_keys=True)]


def write_script(place: Path, command: list[str]) -> None:
    """serve.sh, which may be started from anywhere."""
    path = place / "serve.sh"
    path.write_text(SCRIPT.format(command=shlex.join(command)), encoding="utf-8")
    path.chmod(0o755)
