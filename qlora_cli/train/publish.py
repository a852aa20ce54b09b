"""The result of a run: an ordinary PEFT folder with tokenizer, chat template and a card."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from qlora_cli import __version__
from qlora_cli.data.chat import find_template
from qlora_cli.model.adapter import save_adapter
from qlora_cli.model.base import Base
from qlora_cli.model.heads import TASKS
from qlora_cli.model.owner import Owner, changed_content
from qlora_cli.model.prequantized import method_of
from qlora_cli.model.source import read_config
from qlora_cli.model.start import changes_base
from qlora_cli.model.whole_folder import publish
from qlora_cli.quant.bitsandbytes import CONFIGS
from qlora_cli.quant.layers import is_packed, skip_patterns
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.schema import Quantization
from qlora_cli.train.card import short, with_place

CARD = """---
base_model: {base}
library_name: peft
tags: [qlora, lora]
---

# A LoRA adapter for {base}

Trained by qlora {version} for {steps} optimizer steps on {data}
(base stored as {stored}, compute in {compute_dtype}, learning rate {learning_rate:g}, seed {seed}).
"""

PLAIN = """
```python
import torch
from peft import {peft_class}
{config}
model = {peft_class}.from_pretrained("path/to/this/folder", {arguments})
```
"""

QUANTIZED = """from transformers import BitsAndBytesConfig

quantized = BitsAndBytesConfig({settings})"""

ON_QUANTIZED = """
It was trained on the base as it is quantised here, and says other things on another one. `qlora merge` adds it to these
very weights.
"""

PACKED = """
It was trained on the quantised base, in packed layers of `qlora`: `qlora quantize RECIPE --out BASE` stores them, and

```python
import qlora_cli.quant.plugin  # teaches transformers the packed layers
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained("BASE")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

loads them. Where there are no packed layers, run `qlora merge`.
"""

STARTED = """
Its start ({init}) changed the base: it belongs to `{folder}` and to no other.

```python
import qlora_cli.quant.plugin  # teaches transformers the packed layers
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained("path/to/that/folder")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

Where there are no packed layers, run `qlora merge`.
"""


def publish_adapter(folder: Path, model: Any, base: Base, recipe: Recipe, steps: int) -> Path:
    """Writes the adapter folder, whole or not at all; PEFT and vLLM load it as it is."""

    def write(place: Path) -> None:
        save_adapter(model, place, owner_of(recipe, base))
        base.tokenizer.chat_template = trained_template(recipe, base)
        base.tokenizer.save_pretrained(place)
        (place / "README.md").write_text(with_place(card(recipe, base, steps)))

    return publish(folder, write)


def owner_of(recipe: Recipe, base: Base) -> Owner:
    """The base as an adapter folder names it: by hub id, or by its whole path, so that PEFT finds it anywhere."""
    name = str(base.folder) if changes_base(recipe.adapter) else recipe.model.name_or_path
    return Owner(os.path.abspath(name) if os.path.isdir(name) else name, changed_content(base.folder))


def trained_template(recipe: Recipe, base: Base) -> str | None:
    """The chat template that the run trains with: it travels with the adapter."""
    return find_template(recipe.data.chat_template, base.tokenizer)[1]


def card(recipe: Recipe, base: Base, steps: int) -> str:
    """The model card, with all that it takes to quantise the base as it was."""
    defaults = Quantization().model_dump()
    given = {name: value for name, value in recipe.quantization.model_dump().items() if value != defaults[name]}
    stored = {"data_type": recipe.quantization.data_type, **given}
    text = CARD.format(
        base=short(recipe.model.name_or_path),
        version=__version__,
        steps=steps,
        data=", ".join(short(source.path) for source in recipe.data.train),
        stored=", ".join(f"{name} {value}" for name, value in stored.items()),
        compute_dtype=str(base.compute_dtype).removeprefix("torch."),
        learning_rate=recipe.training.learning_rate,
        seed=recipe.training.seed,
    )
    auto_class = TASKS[base.task].auto_class
    if changes_base(recipe.adapter):
        return text + STARTED.format(init=recipe.adapter.init, folder=base.folder, auto_class=auto_class)
    if is_packed(recipe.quantization):
        return text + PACKED.format(auto_class=auto_class)
    config, arguments = loading(recipe, base)
    peft_class = auto_class.replace("AutoModel", "AutoPeftModel")
    plain = PLAIN.format(peft_class=peft_class, config=config, arguments=arguments + head_arguments(base))
    return text + plain + (ON_QUANTIZED if config else "")


def loading(recipe: Recipe, base: Base) -> tuple[str, str]:
    """Lines that say how the base is quantised, none where it is not or is stored so, and the arguments of a loader."""
    dtype = f"dtype={base.compute_dtype}"
    quantization = base.head.spared(recipe.quantization)
    if quantization.data_type not in CONFIGS or method_of(read_config(base.folder)) is not None:
        return "", dtype
    skipped = skip_patterns(quantization)
    known = {**CONFIGS[quantization.data_type](quantization, base.compute_dtype), "llm_int8_skip_modules": skipped}
    settings = ", ".join(f"{name}={value!r}" for name, value in known.items())
    return QUANTIZED.format(settings=settings), f"quantization_config=quantized, {dtype}"


def head_arguments(base: Base) -> str:
    """What the base's config must be told, which knows nothing of a head: as the end of an argument list."""
    if base.task != "sequence_classification":
        return ""
    told = {"num_labels": base.config.num_labels, "pad_token_id": base.config.pad_token_id}
    return "".join(f", {name}={value}" for name, value in told.items() if value is not None)
