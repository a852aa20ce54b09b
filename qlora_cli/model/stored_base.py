"""A quantised base as a folder: an ordinary model folder, with the adapter's start in a folder inside where it has one.

LoftQ's published models have the same form: the quantised weights, and `loftq_init/` with the adapter.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_cli.errors import Exit, UserError
from qlora_cli.model.adapter import attach_adapter, save_adapter
from qlora_cli.model.base import Base, Found, load_base, quiet_loading, readable_bytes
from qlora_cli.model.heads import TASKS
from qlora_cli.model.owner import AROUND, Owner
from qlora_cli.model.placement import resident
from qlora_cli.model.prequantized import RECORD, method_of
from qlora_cli.model.source import read_config
from qlora_cli.model.start import Line, adapted_layers, changes_base, start_layers
from qlora_cli.model.whole_folder import MANIFEST, sha256
from qlora_cli.quant.layers import stored_tensors
from qlora_cli.recipe.schema import Adapter, Quantization, Recipe

CARD = """# {name}, quantised

The linear weights are stored as {stored}. `start.json` says what this folder was made of.

```python
import qlora_cli.quant.plugin  # teaches transformers the packed layers
from transformers import {auto_class}

base = {auto_class}.from_pretrained("this/folder")
```
"""

START = """
The adapter in `{init}_init/` was made with these weights: use neither without the other. `start.json` has the error of
every layer.

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "this/folder/{init}_init", is_trainable=True)
```
"""

NO_COMPANIONS = ("config.json", MANIFEST, "merge.json")
"""Files of a model folder that a base made of it has of its own."""


@dataclass(frozen=True)
class Making:
    """What a base is made with, beside the recipe.

    say: tells a line; target: where it will be found; rows: token ids of the calibration rows.
    """

    say: Callable[[str], None]
    device: torch.device
    target: Path
    rows: Sequence[Sequence[int]] = ()


def start_folder(base: Path, adapter: Adapter) -> Path:
    """Where in a stored base the adapter's start lies."""
    return base / f"{adapter.init}_init"


def on_stored_base(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe as it reads for a base that is stored already: its folder, and no key of how to store it."""
    model = recipe.model.model_copy(update={"name_or_path": str(folder), "revision": None})
    loaded = Quantization(compute_dtype=recipe.quantization.compute_dtype)
    if method_of(read_config(folder)) is None:  # ordinary weights, which stay so
        loaded = loaded.model_copy(update={"data_type": "none"})
    return recipe.model_copy(update={"model": model, "quantization": loaded})


def write_base(place: Path, recipe: Recipe, found: Found, made_from: dict[str, Any], making: Making) -> list[Line]:
    """Writes the quantised base into a folder that is there, and returns the table of errors of a start.

    With a start that changes it the adapter's start lies inside, and each line of the table is told when it is made.
    """
    started = changes_base(recipe.adapter)
    base = load_base(resident(recipe), making.device, found, packed=started)
    check_room(base, place, making)
    table = list(start_base(place, recipe, base, making)) if started else []
    with quiet_loading():
        base.model.save_pretrained(place, save_original_format=not base.head.renamed)  # no other loader renames them
    for path in companions(found.folder):
        shutil.copyfile(path, place / path.name)
    record = {"made_from": made_from, "table": [asdict(line) for line in table]}
    (place / RECORD).write_text(json.dumps(record, indent=1))
    (place / "README.md").write_text(card(recipe))
    return table


def start_base(place: Path, recipe: Recipe, base: Base, making: Making) -> Iterator[Line]:
    """Changes the base to the one that the adapter's start belongs to, and writes the start into `place`."""
    model = attach_adapter(base, recipe.adapter)
    number, lines = len(adapted_layers(model)), []
    of = "error of outputs" if making.rows else "error"
    for line in start_layers(recipe, base, model, making.rows):
        lines.append(line)
        kept = f"iteration {line.iteration}" if line.iteration else "plain quantisation is best"
        errors = f"{of} {line.before:.4f} -> {line.after:.4f}"
        making.say(f"{recipe.adapter.init:<8} {len(lines)}/{number} {line.module}  rank {line.rank}  {errors}  {kept}")
        yield line
    before, after = (sum(getattr(line, side) for line in lines) / number for side in ("before", "after"))
    making.say(f"{recipe.adapter.init:<8} {number} layers, mean {of} {before:.4f} -> {after:.4f}")
    save_adapter(model, start_folder(place, recipe.adapter), Owner(AROUND))
    model.unload()  # the base has its own layers again


def check_room(base: Base, place: Path, making: Making) -> None:
    """Says what the stored base will take. Raises UserError where the disk has less."""
    size = sum(tensor.numel() * tensor.element_size() for _kind, tensor in stored_tensors(base.model))
    free = shutil.disk_usage(place).free
    making.say(f"base     {readable_bytes(size)} of weights will be stored in {making.target}")
    if free < size:
        what = f"{size:,} bytes are needed for the stored base and {free:,} are free"
        raise UserError(making.target, what, "free space or choose another place", Exit.FAILED)


def companions(folder: Path) -> list[Path]:
    """Tokenizer, chat template, generation defaults and code of a model folder."""
    found = (path for pattern in ("*.json", "*.model", "*.txt", "*.jinja", "*.py") for path in folder.glob(pattern))
    return [path for path in found if path.name not in NO_COMPANIONS and not path.name.endswith(".index.json")]


def made_of(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that says what is stored, as JSON."""
    quantization = recipe.quantization.model_dump(exclude={"compute_dtype", "outlier_threshold"})
    added = {"added_tokens": recipe.model.added_tokens} if recipe.model.added_tokens else {}
    return {
        **added,
        "model": recipe.model.name_or_path,
        "revision": recipe.model.revision,
        "quantization": quantization,
        "adapter": recipe.adapter.model_dump(by_alias=True),
    }


def made_from(recipe: Recipe, folder: Path, dtype: torch.dtype, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """JSON that is the same for the same stored base: the model's files by content, and all that bears on its making.

    The order of patterns counts: compare it as text.
    """
    files = [folder / "config.json", *folder.glob("*.safetensors"), *companions(folder)]
    return {
        **made_of(recipe),
        "files": {path.name: sha256(path) for path in sorted(files)},
        "compute_dtype": str(dtype).removeprefix("torch."),
        "seed": recipe.training.seed,
        "calibration_rows": len(rows),
        "calibration": hashlib.sha256(json.dumps([list(row) for row in rows]).encode()).hexdigest() if rows else None,
    }


def card(recipe: Recipe) -> str:
    """The README of a stored base."""
    quantization = recipe.quantization
    stored = f"{quantization.data_type} in blocks of {quantization.block_size}"
    auto_class = TASKS[recipe.model.task].auto_class
    text = CARD.format(name=recipe.model.name_or_path, stored=stored, auto_class=auto_class)
    return text + START.format(init=recipe.adapter.init) if changes_base(recipe.adapter) else text
