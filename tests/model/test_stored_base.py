"""A stored base is an ordinary folder, and what it was made of tells it from any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_cli.quant.plugin  # noqa: F401 (teaches transformers the packed layers)
from qlora_cli.model.base import find_base
from qlora_cli.model.stored_base import Making, made_from, on_stored_base, write_base
from qlora_cli.model.whole_folder import fault, publish, publish_by_content
from qlora_cli.recipe import Recipe

ROWS = [[3, 4, 5], [7, 8]]


def edited(name: str, old: str, new: str) -> Callable[[dict[str, Any], Path], None]:
    def edit(_values: dict[str, Any], model: Path) -> None:
        text = (model / name).read_text()
        assert old in text
        (model / name).write_text(text.replace(old, new))

    return edit


def flipped(_values: dict[str, Any], model: Path) -> None:
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)


CHANGES: dict[str, Callable[[dict[str, Any], Path], Any]] = {
    "rank": lambda values, model: values["adapter"].update(r=2),
    "iterations": lambda values, model: values["adapter"]["loftq"].update(iterations=2),
    "data type": lambda values, model: values["quantization"].update(data_type="nf2"),
    "order of patterns": lambda values, model: values["quantization"].update(
        overrides={"*.up_proj": "none", "*.q_proj": "nf4"}
    ),
    "seed": lambda values, model: values["training"].update(seed=8),
    "weights": flipped,
    "config.json": edited("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
    "tokenizer": edited("tokenizer.json", "<|im_start|>", "<|im_begin|>"),
    "chat template": edited("chat_template.jinja", "assistant", "model"),
    "code": lambda values, model: (model / "own.py").write_text(""),
}


def values_on(model: Path) -> dict[str, Any]:
    """A recipe of a start."""
    return {
        "model": {"name_or_path": str(model)},
        "quantization": {
            "data_type": "int2",
            "compute_dtype": "float32",
            "overrides": {"*.q_proj": "nf4", "*.up_proj": "none"},
        },
        "adapter": {"r": 4, "alpha": 8, "init": "loftq", "loftq": {"iterations": 1}},
        "data": {"train": [{"path": "rows.jsonl"}]},
        "training": {"seed": 7},
    }


def made(values: dict[str, Any], model: Path, dtype: torch.dtype = torch.float32, rows: Any = ROWS) -> str:
    """As text, through the JSON of start.json."""
    record = made_from(Recipe.model_validate(values), model, dtype, rows)
    return json.dumps(json.loads(json.dumps(record)))


@pytest.mark.parametrize("change", CHANGES)
def test_what_bears_on_the_base_is_in_what_it_was_made_of(change, tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    values = values_on(model)
    before = made(values, model)
    assert made(values, model) == before
    CHANGES[change](values, model)
    assert made(values, model) != before


def test_so_are_compute_dtype_and_calibration_rows_and_nothing_that_does_not_matter(tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    values = values_on(model)
    before = made(values, model)
    assert made(values, model, torch.bfloat16) != before
    assert made(values, model, rows=[[3, 4], [5, 7, 8]]) != before
    assert made(values, model, rows=[]) != before
    values["training"] |= {"max_steps": 3, "learning_rate": 0.1}
    values["output_dir"] = "elsewhere"
    (model / "README.md").write_text("")
    assert made(values, model) == before


@pytest.fixture
def as_downloaded(tiny_model: Path, tmp_path: Path) -> Path:
    """The model as the hub's cache has it, links to files elsewhere, with a manifest.json that is not ours."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    for number, path in enumerate(sorted(tiny_model.iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (folder / path.name).symlink_to(f"../blobs/{number}")
    (folder / "manifest.json").write_text('{"name": "an app", "files": 3}')
    (folder / "own.py").write_text("x = 1\n")
    return folder


@pytest.mark.parametrize("init", ["loftq", "default"])
def test_a_stored_base_is_whole_with_the_tokenizer_and_code_of_its_model(init, as_downloaded, tmp_path):
    values = values_on(as_downloaded)
    values["adapter"] = {"r": 4, "alpha": 8, "init": init}
    recipe, told = Recipe.model_validate(values), []
    making = Making(told.append, torch.device("cpu"), tmp_path / "base")

    def write(place: Path) -> None:
        torch.manual_seed(0)  # layers that lose nothing keep a random A
        write_base(place, recipe, find_base(recipe), {"files": {}}, making)

    folder = publish(tmp_path / "stored", write)
    assert fault(folder) == ""
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert (folder / "own.py").read_text() == "x = 1\n"
    assert (folder / f"{init}_init").is_dir() == (init == "loftq")
    assert (f"{init}_init" in (folder / "README.md").read_text()) == (init == "loftq")
    tokenizers = [AutoTokenizer.from_pretrained(one) for one in (folder, as_downloaded)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    model = AutoModelForCausalLM.from_pretrained(folder)
    kinds = [getattr(model.model.layers[0].self_attn, name).storage.data_type for name in ("q_proj", "k_proj")]
    assert kinds == ["nf4", "int2"]
    assert sum("/14 model.layers." in line for line in told) == (14 if init == "loftq" else 0)
    assert publish_by_content(tmp_path, write).name == publish_by_content(tmp_path, write).name, "not reproducible"


def test_a_recipe_on_a_stored_base_says_nothing_of_how_to_store_it(as_downloaded, tiny_model, tmp_path):
    values = values_on(as_downloaded) | {"adapter": {"init": "pissa"}}
    values["model"]["revision"] = "main"
    recipe = Recipe.model_validate(values)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "qlora_packed"}}')
    for folder, data_type in ((tmp_path, "nf4"), (tiny_model, "none")):
        found = on_stored_base(recipe, folder)
        assert (found.model.name_or_path, found.model.revision) == (str(folder), None)
        assert found.quantization.model_dump() == {
            **type(recipe.quantization)().model_dump(),
            "compute_dtype": "float32",
            "data_type": data_type,
        }
        assert found.adapter == recipe.adapter
