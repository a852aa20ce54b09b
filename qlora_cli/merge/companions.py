"""What lies beside the weights of a merged model: config.json, generation defaults, tokenizer and template."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

TOKENIZER_FILES = """
tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt
vocab.txt tokenizer.model spiece.model sentencepiece.bpe.model spm.model chat_template.jinja chat_template.json
""".split()  # noqa: SIM905
"""What makes a tokenizer folder, by transformers' names."""


def write_config(folder: Path, base: Path, changes: dict[str, Any]) -> None:
    """The base's config.json with changes, as one of ordinary weights, and its generation_config.json."""
    config = json.loads((base / "config.json").read_bytes())
    for name in ("torch_dtype", "quantization_config"):
        config.pop(name, None)
    write_json(folder / "config.json", config | changes)
    if (base / "generation_config.json").is_file():
        write(folder / "generation_config.json", (base / "generation_config.json").read_bytes())


def write_tokenizer(folder: Path, base: Path, adapter: Path) -> None:
    """The adapter's tokenizer and template, which were trained with; of an adapter without one the base's."""
    complete = any((adapter / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    for source in [adapter] if complete else [base, adapter]:  # a template alone replaces the base's
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                write(folder / name, (source / name).read_bytes())


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A JSON file that is on the disk when this returns."""
    write(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write(path: Path, content: bytes) -> None:
    """A file that is on the disk when this returns."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
