"""run.json: what was trained, on what, with which versions."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qlora_cli import __version__
from qlora_cli.data.readers import DataFile
from qlora_cli.data.sources import Part
from qlora_cli.data.store import part_to_json
from qlora_cli.model.base import Base
from qlora_cli.model.whole_folder import sha256
from qlora_cli.quant.layers import quantized_modules
from qlora_cli.recipe import Recipe
from qlora_cli.train.feed import Feed
from qlora_cli.train.publish import trained_template

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers", "safetensors")


def run_facts(recipe: Recipe, base: Base, base_fingerprint: str, feed: Feed, today: date) -> dict[str, Any]:
    """Versions, device, seed, and the fingerprints that let eval, merge and resume prove what they stand on."""
    device = base.device
    return {
        "qlora": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "date": today.isoformat(),
        "seed": recipe.training.seed,
        "base": {
            "name_or_path": recipe.model.name_or_path,
            "folder": str(base.folder),
            "compute_dtype": str(base.compute_dtype).removeprefix("torch."),
            "quantized_modules": sorted(quantized_modules(base.model)),
        },
        "data": {
            "rows": len(feed.examples.rows),
            "trained_tokens": feed.examples.num_trained,
            "parts": [part_to_json(part) for part in feed.examples.parts],
            "files": file_hashes(feed.examples.parts),
            "split": {"eval_fraction": recipe.data.eval_fraction, "seed": recipe.training.seed},
        },
        "fingerprints": {
            "base": base_fingerprint,
            "tokenizer": digest(base.tokenizer.backend_tokenizer.to_str()),
            "chat_template": digest(str(trained_template(recipe, base))),
            "data": feed.digest,
        },
    }


def file_hashes(parts: Iterable[Part]) -> dict[str, str]:
    """Hex SHA-256 of each file of some data, by its path; what comes from the hub has none."""
    return {part.path: sha256(Path(part.path)) for part in parts if isinstance(part, DataFile)}


def digest(text: str) -> str:
    """Hex SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
