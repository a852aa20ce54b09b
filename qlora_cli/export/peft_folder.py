"""The adapter as a folder for others: verified, with its card, and a base that they have too."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from qlora_cli.errors import UserError
from qlora_cli.export.source import (
    ADAPTER_FILES,
    BASE_LINE,
    Facts,
    Order,
    Source,
    files_of,
    hand_on,
    places_in,
    read_card,
    refuse_place,
    write_card,
)
from qlora_cli.model.adapter import WEIGHTS
from qlora_cli.model.continued import CONFIG
from qlora_cli.model.owner import OWNER
from qlora_cli.model.source import check_header, read_json
from qlora_cli.model.whole_folder import MANIFEST, fault, publish_new

CARD = "README.md"
BASE = "base_model_name_or_path"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def write_peft(source: Source, order: Order) -> Facts:
    """Writes the folder `order.out`, whole or not at all, signed anew. Raises UserError for a damaged adapter."""
    refuse_place(order.out, source.inputs)
    base = named_base(source, order)
    notes: list[str] = []
    publish_new(order.out, lambda place: notes.extend(write_adapter(source, order.base_name, place)))
    if (source.folder / OWNER).is_file():
        notes.append(f"its start changed the base: it works on {base} and no other, which others need too")
    elif not is_hub_id(base):
        notes.append(f"the base is a folder of this machine, {base}: --base-name HUB/ID names it as others find it")
    return Facts({"base": base}, notes)


def write_adapter(source: Source, base_name: str | None, place: Path) -> list[str]:
    """The adapter's files in a folder, with `base_name` as the base where it is given; returns notes.

    Raises UserError for files that are not those that were written, and for weights that are not safetensors.
    """
    adapter = source.folder
    if (adapter / MANIFEST).exists() and (reason := fault(adapter)):
        raise UserError(adapter, reason, "train again, or take the adapter out of the newest checkpoint")
    if not (adapter / WEIGHTS).is_file():
        raise UserError(adapter, f"no {WEIGHTS} there", "name a PEFT folder with safetensors weights")
    check_header(adapter / WEIGHTS)
    notes = hand_on(files_of(adapter, ADAPTER_FILES), place, (*source.places, *places_in(source.base)))
    if base_name is not None:
        config = read_json(place / CONFIG, "a PEFT adapter folder needs it") | {BASE: base_name}
        (place / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
        if (place / CARD).is_file():
            name_in_card(place / CARD, source.base, base_name)
    return [note for note in notes if BASE not in note]  # of which the callers say more


def name_in_card(card: Path, base: str | None, name: str) -> None:
    """Names the base of a card by `name`, in its front matter and in its title. base: what it was called before.

    A folder is no base_model that a hub takes, so the front matter names none then.
    """
    text = BASE_LINE.sub("", read_card(card), count=1)
    if is_hub_id(name) and text.startswith("---\n"):
        text = text.replace("---\n", f"---\nbase_model: {name}\n", 1)
    short = os.path.basename(base) if base is not None and os.path.isabs(base) else base
    title = re.escape(short or name)
    write_card(card, re.sub(rf"(LoRA adapter for ){title}", lambda found: found[1] + name, text))


def named_base(source: Source, order: Order) -> str:
    """What the adapter's base is called. Raises UserError where nothing names it."""
    base = order.base_name if order.base_name is not None else source.base
    if base is None:
        what = f"names no base model ({BASE})"
        raise UserError(source.folder / CONFIG, what, "name its hub id or folder with --base-name")
    return base


def check_base_name(name: str) -> None:
    """Raises UserError for a name that is neither a hub id nor a folder: it goes into JSON, YAML and command lines."""
    if not (HUB_ID.fullmatch(name) or (os.path.isdir(name) and name.isprintable())):
        raise UserError("--base-name", f"{name!r} is no hub id and no folder", "write it as USER/MODEL")


def is_hub_id(name: str) -> bool:
    """Whether a base's name has the form of a hub id, and is no folder here."""
    return HUB_ID.fullmatch(name) is not None and not os.path.isdir(name)
