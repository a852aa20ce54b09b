"""Finished runs for the tests of `qlora merge`: trained in this process, in a second or two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_cli.commands import train
from qlora_cli.model.whole_folder import MANIFEST, sha256
from qlora_cli.recipe import load_recipe
from tests.tiny import write_tiny_model

WEIGHTS = "adapter_model.safetensors"


class Silent:
    """A report that nobody reads."""

    def __getattr__(self, name: str) -> Any:
        return lambda *told: None


def finish_run(folder: Path, base: Path, rows: Path, **sections: Any) -> Path:
    """The folder of a run of four steps on the conversations of `rows` and its heldout.jsonl."""
    values: dict[str, Any] = {
        "model": {"name_or_path": str(base)},
        "quantization": {"compute_dtype": "float32"},
        "adapter": {"r": 4, "alpha": 8},
        "data": {
            "train": [{"path": str(rows)}],
            "eval": [{"path": str(rows.with_name("heldout.jsonl"))}],
            "max_length": 256,
        },
        "training": {
            "max_steps": 4,
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2,
            "optimizer": "adamw",
            "save_steps": 4,
        },
        "output_dir": str(folder / "run"),
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    text = (folder / "recipe.yaml").read_bytes()
    recipe = load_recipe(folder / "recipe.yaml")
    train(recipe, text, Silent(), main_process=True, resume="auto", pause_at=None)
    return folder / "run"


def write_sharded_model(folder: Path, **config: Any) -> Path:
    """The tiny Llama in several files."""
    model = AutoModelForCausalLM.from_pretrained(write_tiny_model(folder, **config))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="150KB")
    assert len([*folder.glob("*.safetensors")]) == 3
    return folder


def sign(adapter: Path) -> None:
    """Writes the manifest of an adapter folder anew, as if its files had been saved as they are."""
    described = json.loads((adapter / MANIFEST).read_text())["files"]
    for name in described:
        path = adapter / name
        described[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    (adapter / MANIFEST).write_text(json.dumps({"files": described}))


def change_tensors(path: Path, change: Any) -> None:
    """Writes a safetensors file with what `change` makes of its dict of tensors."""
    tensors = change(load_file(path))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a merged folder; merge.json, which tells seconds, without those and without its place."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    record = json.loads(found.pop("merge.json"))
    kept = {name: value for name, value in record.items() if name not in ("out", "seconds", "quantize_seconds")}
    return found | {"merge.json": json.dumps(kept).encode()}
