"""Which base an adapter belongs to. One that a start changed is told by its content, in a small file of the adapter."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from qlora_cli.errors import Exit, UserError
from qlora_cli.model.prequantized import RECORD
from qlora_cli.model.source import read_json
from qlora_cli.model.whole_folder import MANIFEST, content_name

OWNER = "base.json"
"""In an adapter's folder: the content of the changed base that it was trained on."""

AROUND = ".."
"""How the start of an adapter in a stored base names that base: the folder that it lies in, whatever its name."""

_CONTENT = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Owner:
    """The base of an adapter. name: hub id or folder that others load below it; content: of a changed base."""

    name: str
    content: str | None = None

    def write(self, adapter: Path) -> None:
        """Leaves the content in an adapter's folder, where there is one."""
        if self.content is not None:
            (adapter / OWNER).write_text(json.dumps({"content": self.content}))


def start_of(base: Path) -> Path | None:
    """The folder of the adapter's start in a base that a start changed; None for any other folder."""
    if not all((base / name).is_file() for name in (RECORD, MANIFEST)):
        return None
    record = read_json(base / RECORD, "it says what the base is")
    return base / f"{record['made_from']['adapter']['init']}_init" if record.get("table") else None


def changed_content(base: Path) -> str | None:
    """The content name of a base that a start changed; None for any other folder."""
    return content_name(base) if start_of(base) else None


def refuse_other_base(base: Path, adapter: Path, named: str | None) -> None:
    """Refuses an adapter on a base that a start changed unless it was trained on it, and one of such a base on others.

    named: the base in its adapter_config.json.
    """
    owner = adapter.absolute().parent if named == AROUND else Path(named or "")
    if (adapter / OWNER).is_file():
        wanted = read_json(adapter / OWNER, "it says which base this is for").get("content")
    else:
        wanted = owner.name if _CONTENT.fullmatch(owner.name) else changed_content(owner)
    if named == AROUND and wanted is None:
        what = "the adapter is the start that lay in a stored base, and is not in it any more"
        raise UserError(adapter, what, "name it where it was stored", Exit.REFUSED)
    if wanted == changed_content(base):
        return
    there = "" if owner.exists() else ", which is not there any more"
    trained_on = f"this adapter was trained on {owner}{there}"
    why = (
        "its start belongs to other weights" if wanted else "that base belongs to the adapters that were trained on it"
    )
    todo = "measure it through its own run, or with a recipe whose model.name_or_path is its base"
    raise UserError(adapter, f"{trained_on}, and this is {base}: {why}", todo, Exit.REFUSED)
