"""What `qlora export --to` can make. To add one: a function and a line; the help and the documents read the table."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_cli.errors import UserError
from qlora_cli.export.source import Facts, Order, Source, facts_of


@dataclass(frozen=True)
class Exporter:
    """One destination.

    help:       one line.
    needs:      the merged model's folder, or the adapter's.
    write:      writes `order.out`, whole or not at all. Raises UserError at once for what cannot be done.
    file_type:  what it is where --type is not given; "" where there are no types.
    file:       the name of the file that it makes, with {file_type}; "": it makes a folder.
    names_base: whether --base-name is for it.
    reads_base: whether it reads the config of an adapter's base, which may be on a hub.
    """

    help: str
    needs: Literal["merged", "adapter"]
    write: Callable[[Source, Order], Facts]
    file_type: str = ""
    file: str = ""
    names_base: bool = False
    reads_base: bool = False


def gguf(source: Source, order: Order) -> Facts:
    """The merged model as one file."""
    from qlora_cli.export.gguf import check_gguf, write_gguf
    from qlora_cli.export.gguf_tokenizer import Trained

    trained = Trained(source.template_kwargs, source.today)
    check_gguf(source.folder, order.file_type, trained)
    written = write_gguf(source.folder, order.out, order.file_type, order.say, trained)
    return facts_of(written, *template_arguments(source, order.out))


def template_arguments(source: Source, out: Path) -> tuple[list[str], list[str]]:
    """A note and the command for a template with arguments, which a GGUF has no place for."""
    if not source.template_kwargs:
        return [], []
    arguments = json.dumps(source.template_kwargs, sort_keys=True)
    note = "a GGUF has no place for data.chat_template_kwargs: the server has to be told"
    command = ["llama-server", "-m", str(out), "--jinja", "--chat-template-kwargs", arguments]
    return [f"{note} {arguments}"], [shlex.join(command)]


def gguf_lora(source: Source, order: Order) -> Facts:
    """The adapter as one file, for a GGUF of its base."""
    from qlora_cli.export.gguf import check_lora_gguf, write_lora_gguf

    base = base_folder(source)
    check_lora_gguf(source.folder, base)
    told = write_lora_gguf(source.folder, base, order.out, order.file_type, order.say)
    return facts_of(told, trained_otherwise(source))


def base_folder(source: Source) -> Path:
    """The folder with the config of an adapter's base. Raises UserError where it is not to be found."""
    from qlora_cli.model.source import locate
    from qlora_cli.recipe.schema import Model

    if source.base_folder is not None and source.base_folder.is_dir():
        return source.base_folder
    if source.base is None:
        what = "names no base model (base_model_name_or_path)"
        raise UserError(source.folder / "adapter_config.json", what, "write its hub id or folder there")
    return locate(Model(name_or_path=source.base))


def trained_otherwise(source: Source) -> list[str]:
    """A note on an adapter that was trained on a quantised base and goes where the base may be another."""
    if source.stored in (None, "none"):
        return []
    what = f"the adapter was trained on the base in {source.stored}, and is served on what the server loads"
    return [f"{what}: the merged model, onto dequantized weights, is nearer to what was trained"]


def ollama(source: Source, order: Order) -> Facts:
    """A folder with the GGUF and a Modelfile."""
    from qlora_cli.export.ollama import write_ollama

    return write_ollama(source, order)


def vllm(source: Source, order: Order) -> Facts:
    """The merged model's folder with the command that serves it."""
    from qlora_cli.export.vllm import write_vllm

    return write_vllm(source, order)


def vllm_lora(source: Source, order: Order) -> Facts:
    """The adapter's folder with the command that serves it on its base."""
    from qlora_cli.export.vllm import write_vllm_lora

    told = write_vllm_lora(source, order)
    return Facts(told.told, [*told.notes, *trained_otherwise(source)], told.commands)


def peft(source: Source, order: Order) -> Facts:
    """The adapter's folder with its card."""
    from qlora_cli.export.peft_folder import write_peft

    return write_peft(source, order)


EXPORTERS: dict[str, Exporter] = {
    "gguf": Exporter("the merged model as a file for llama.cpp", "merged", gguf, "q8_0", "model-{file_type}.gguf"),
    "gguf-lora": Exporter(
        "the adapter as a file for llama.cpp", "adapter", gguf_lora, "f16", "adapter-{file_type}.gguf", reads_base=True
    ),
    "ollama": Exporter("a folder with Modelfile and GGUF", "merged", ollama, "q8_0"),
    "vllm": Exporter("the merged model's folder and its command line", "merged", vllm),
    "vllm-lora": Exporter("the adapter's folder and its command line", "adapter", vllm_lora, names_base=True),
    "peft": Exporter("the adapter's folder with its card", "adapter", peft, names_base=True),
}
"""By the name on the command line."""


def exporter_of(name: str) -> Exporter:
    """The exporter of that name. Raises UserError with the nearest name for any other."""
    if name in EXPORTERS:
        return EXPORTERS[name]
    near = difflib.get_close_matches(name.lower(), EXPORTERS, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    raise UserError("--to", f"there is no exporter {name!r}", f"{guess}choose from {', '.join(EXPORTERS)}")
