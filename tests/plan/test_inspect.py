"""`qlora inspect`: figures against plain torch and against live models, what it prints and draws, what it refuses."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_cli.display import QuietReport
from qlora_cli.model.base import load_base
from qlora_cli.plan.inspect import inspect
from qlora_cli.quant.packed import BUFFERS
from qlora_cli.recipe.of_model import DATA_TYPES, recipe_of_model
from tests.conftest import REPOSITORY, Ended
from tests.tiny import write_tiny_model

FP32 = "quantization.compute_dtype=float32"
PLAIN = ("--set", FP32, "--set", "quantization.double_quant=false")


def measured(model: Path, types: list[str], *options: str, **arguments: Any) -> dict[str, Any]:
    return inspect(recipe_of_model(str(model), types, None, [FP32, *options]), types, QuietReport(), **arguments)


def json_of(ended: Ended) -> dict[str, Any]:
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def linear_weights(model: Path) -> dict[str, Tensor]:
    tensors = load_file(model / "model.safetensors")
    return {name.removesuffix(".weight"): one for name, one in tensors.items() if name.endswith("_proj.weight")}


# ── errors and bits ──────────────────────────────────────────────────────────────────────────────────────────────────

NF4 = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
       0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]  # fmt: skip
"""QLoRA, appendix E."""


def nf4(weight: Tensor) -> Tensor:
    """Every weight to the nearest of 16 levels, in units of the absmax of its 64."""
    blocks, levels = weight.double().view(-1, 64, 1), torch.tensor(NF4, dtype=torch.float64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks / scale - levels).abs().argmin(dim=2)
    return (levels[nearest] * scale.squeeze(1)).view(weight.shape)


def int2(weight: Tensor) -> Tensor:
    """The best of all that ±s and ±s/4 can say of 64 weights: every split by magnitude, each with its least squares."""
    blocks = weight.double().view(-1, 64)
    ranks = blocks.abs().argsort(dim=1).argsort(dim=1)
    best, least = torch.zeros_like(blocks), torch.full((len(blocks), 1), math.inf, dtype=torch.float64)
    for small in range(65):
        units = torch.where(ranks < small, 0.25, 1.0) * blocks.sign()
        scale = (units * blocks).sum(1, keepdim=True) / units.square().sum(1, keepdim=True)
        error = (units * scale - blocks).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, units * scale, best), torch.minimum(error, least)
    return best.view(weight.shape)


def int8(weight: Tensor) -> Tensor:
    """127 steps on either side of zero to each row's absmax; bitsandbytes takes the weight in 16 bits."""
    rows = weight.half().double()
    scale = rows.abs().amax(dim=1, keepdim=True) / 127
    return (rows / scale).round() * scale


@pytest.mark.parametrize(("kind", "quantised"), [("nf4", nf4), ("int2", int2), ("int8", int8)])
def test_errors_are_those_of_plain_torch(tiny_model, kind: str, quantised: Callable[[Tensor], Tensor]):
    result = measured(tiny_model, ["nf4", "int2", "int8"], "quantization.double_quant=false")
    weights = linear_weights(tiny_model)
    layers = {layer["name"]: layer for layer in result["layers"]}
    assert layers.keys() == weights.keys()
    lost = {name: (quantised(weight) - weight).square().sum() for name, weight in weights.items()}
    for name, weight in weights.items():
        expected = (lost[name] / weight.double().square().sum()).sqrt().item()
        assert layers[name]["types"][kind]["error"] == pytest.approx(expected, rel=2e-3), name
        assert layers[name]["shape"] == weight.shape
    energy = sum(weight.double().square().sum() for weight in weights.values())
    total = result["types"][kind]
    assert total["error"] == pytest.approx((sum(lost.values()) / energy).sqrt().item(), rel=1e-3)
    worst = max(layers.values(), key=lambda layer: layer["types"][kind]["error"])
    assert total["worst"] == {"layer": worst["name"], "error": worst["types"][kind]["error"]}


@pytest.mark.parametrize("double_quant", [True, False])
def test_bits_are_those_of_a_live_models_buffers(tiny_model, double_quant):
    options = [f"quantization.double_quant={str(double_quant).lower()}"]
    total = measured(tiny_model, ["nf2"], *options)["types"]["nf2"]
    recipe = recipe_of_model(str(tiny_model), ["nf2"], None, [FP32, *options])
    layers = [one for one in load_base(recipe, torch.device("cpu")).model.modules() if hasattr(one, "storage")]
    tensors = [getattr(layer, name) for layer in layers for name in ("weight", *BUFFERS)]
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
    assert total["num_weights"] == sum(layer.in_features * layer.out_features for layer in layers)
    assert total["bits"] == pytest.approx(8 * num_bytes / total["num_weights"], rel=1e-12)


def test_known_errors_of_a_published_model(shared):
    """Those of scripts/code_errors.py; all data types, from the files and in order."""
    result = inspect(recipe_of_model(str(shared / "weights/stories260k-hf"), DATA_TYPES), DATA_TYPES, QuietReport())
    assert list(result["types"]) == [*DATA_TYPES]
    known = {"nf4": 0.0915, "fp4": 0.1213, "int4": 0.0982, "nf2": 0.5603, "int2": 0.3328}
    for kind, error in known.items():
        assert result["types"][kind]["error"] == pytest.approx(error, rel=3e-3), kind
        assert result["types"][kind]["dequantize_weights_per_s"] > 1e6
    assert result["types"]["int8"]["error"] < 0.01
    assert (len(result["layers"]), result["num_parameters"]) == (35, 260_032)


# ── which weights ────────────────────────────────────────────────────────────────────────────────────────────────────


def names_of(result: dict[str, Any]) -> set[str]:
    return {layer["name"] for layer in result["layers"]}


def test_skipped_modules_are_not_measured_and_a_name_that_skips_nothing_is_refused(tiny_model, qlora):
    everything = names_of(measured(tiny_model, ["nf4"], "quantization.skip_modules=[]"))
    assert everything == {*linear_weights(tiny_model), "lm_head"}
    some = names_of(measured(tiny_model, ["nf4"], "quantization.skip_modules=[lm_head, down_proj, model.layers.0]"))
    assert some == {name for name in everything if "layers.1" in name and "down" not in name}
    ended = qlora("inspect", tiny_model, "--set", "quantization.skip_modules=[q_prj]")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("quantization.skip_modules: 'q_prj' matches no module. Choose from ")


def test_conv1d_weights_lie_as_their_layer_multiplies_under_the_names_of_the_hub_too(tmp_path):
    config = AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    result = measured(tmp_path, ["int8"])
    shapes = {layer["name"]: list(layer["shape"]) for layer in result["layers"]}
    assert shapes["transformer.h.0.attn.c_attn"] == [96, 32]
    assert len(shapes) == 8
    tensors = load_file(tmp_path / "model.safetensors")
    weight = tensors["transformer.h.0.attn.c_attn.weight"].T
    expected = ((int8(weight) - weight).norm() / weight.norm()).item()
    assert result["layers"][0]["types"]["int8"]["error"] == pytest.approx(expected, rel=2e-3)
    bare = {name.removeprefix("transformer."): one.contiguous() for name, one in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors", {"format": "pt"})
    again = measured(tmp_path, ["int8"])
    assert [layer["types"]["int8"]["error"] for layer in again["layers"]] == [
        layer["types"]["int8"]["error"] for layer in result["layers"]
    ]


def test_shards_are_read_one_weight_at_a_time(tiny_model, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    whole, sharded = measured(tiny_model, ["int4"]), measured(tmp_path, ["int4"])
    assert sharded["types"]["int4"]["error"] == whole["types"]["int4"]["error"]


def test_what_cannot_be_quantised_is_told_by_name_and_left_out_of_every_type(tmp_path, qlora):
    """A head that is the embedding, a NaN, and weights of no whole blocks; int8 alone has no blocks."""
    folder = write_tiny_model(tmp_path / "model", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    options = ["--set", "quantization.block_size=4096", "--set", "quantization.skip_modules=[]"]
    result = json_of(qlora("inspect", folder, "--types", "int2,int8", *options, "--json"))
    left_out = {one["where"].rsplit(" ", 1)[-1]: one["what"] for one in result["left_out"]}
    odd = "has 2,048 values, which is no multiple of quantization.block_size 4096"
    kv = [f"model.layers.{at}.self_attn.{name}_proj" for at in (0, 1) for name in "kv"]
    assert left_out == {
        **dict.fromkeys(kv, odd),
        "model.layers.0.mlp.up_proj.weight": "holds NaN or infinity",
        "lm_head": "is the embedding's weight too",
    }
    weights = sum(one["num_weights"] for one in [layer["types"]["int8"] for layer in result["layers"]])
    assert {total["num_weights"] for total in result["types"].values()} == {weights}
    ended = qlora("inspect", folder, "--types", "int2", *options)
    assert f"left out  {folder}/model.safetensors: model.layers.0.mlp.up_proj.weight: holds NaN" in ended.out
    assert kv[0] in names_of(measured(folder, ["int8"]))


def test_a_checkpoint_of_another_shape_or_without_a_tensor_is_told_by_name(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    tensors["model.layers.0.self_attn.o_proj.weight"] = torch.zeros(64, 32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    absent, odd = measured(folder, ["nf4"])["left_out"]
    assert "model.layers.0.self_attn.q_proj" in absent["what"]
    assert odd["where"] == f"{folder}/model.safetensors: model.layers.0.self_attn.o_proj.weight"
    assert odd["what"] == "(64, 32) in the file, (64, 64) in the model"


# ── perplexity ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_perplexity_is_what_eval_measures_of_the_base(tiny_model, rows_file, heldout_file, tmp_path, qlora):
    result = json_of(
        qlora("inspect", tiny_model, "--types", "nf4,int2", "--data", heldout_file, "--set", FP32, "--json")
    )
    assert list(result["types"]) == ["none", "nf4", "int2"], "the reference comes first"
    recipe = {
        "model": {"name_or_path": str(tiny_model)},
        "quantization": {"compute_dtype": "float32"},
        "data": {"train": [{"path": str(rows_file)}], "eval": [{"path": str(heldout_file)}], "max_length": 512},
        "evaluation": {"max_new_tokens": 1},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(recipe))
    for kind in result["types"]:
        setting = f"quantization.data_type={kind}"
        known = json_of(qlora("eval", tmp_path / "my.yaml", "--baseline", "--again", "--set", setting, "--json"))
        assert result["rows"] == known["suites"][0]["rows"]
        for figure in ("loss", "perplexity"):
            assert result["types"][kind][figure] == pytest.approx(known["models"]["base"][figure], rel=1e-6), kind
    assert result["types"]["int2"]["loss"] != result["types"]["nf4"]["loss"] != result["types"]["none"]["loss"]


def test_a_published_models_perplexity_rises_as_a_reference_in_plain_torch_says(shared, qlora):
    """../shared/data/README.md: 7.802 / 6.971 for NF4 and 8.739 / 6.971 for FP4, over other pieces of the same text."""
    model, text = shared / "weights/stories260k-hf", shared / "text/tinystories/tinystories.txt"
    options = ["--data", text, "--limit", 100, "--types", "nf4,fp4", *PLAIN, "--json"]
    types = json_of(qlora("inspect", model, *options))["types"]
    assert types["nf4"]["perplexity"] / types["none"]["perplexity"] == pytest.approx(7.802 / 6.971, rel=0.015)
    assert types["fp4"]["perplexity"] / types["none"]["perplexity"] == pytest.approx(8.739 / 6.971, rel=0.03)


def test_rows_are_cut_to_the_context_or_to_max_length_and_it_is_told(tiny_model, tmp_path, qlora):
    path = tmp_path / "long.txt"
    path.write_text("ho" * 400 + "\nshort\nanother\n")
    ended = qlora("inspect", tiny_model, "--types", "nf4", "--data", path, "--json")
    assert json_of(ended)["tokens"] == 511 + 5 + 7
    assert "1 row truncated" in ended.err
    ended = qlora("inspect", tiny_model, "--types", "nf4", "--data", path, "--max-length", 4, "--limit", 2, "--json")
    assert (json_of(ended)["rows"], json_of(ended)["tokens"]) == (2, 6)
    ended = qlora("inspect", tiny_model, "--data", path, "--max-length", 513)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "--max-length 513: the model has 512 positions. Name at most 512, or leave it out.\n"


def test_a_type_that_cannot_be_loaded_has_no_perplexity_and_says_why(tiny_model, heldout_file, qlora):
    options = ["--types", "int2", "--set", "quantization.block_size=4096", "--data", heldout_file]
    result = json_of(qlora("inspect", tiny_model, *options, "--json"))
    assert result["types"]["none"]["perplexity"] > 1
    assert result["types"]["int2"]["perplexity"] is None
    assert "model.layers.0.self_attn.k_proj.weight: has 2,048 values" in result["types"]["int2"]["refused"]
    ended = qlora("inspect", tiny_model, *options)
    assert (ended.code, "int2     no perplexity: " in ended.err) == (0, True), ended.err
    assert next(line for line in ended.out.splitlines() if line.startswith("int2")).split()[-1] == "-"


# ── what is printed and drawn ────────────────────────────────────────────────────────────────────────────────────────


def test_the_table_has_a_line_for_each_type_and_with_layers_for_each_layer_too(tiny_model, qlora):
    ended = qlora("inspect", tiny_model, "--types", "nf4,int2,nf4", "--set", "quantization.block_size=128")
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[0] == f"{tiny_model}: 14 linear layers, 73,728 of 107,200 parameters"
    assert lines[1].startswith("blocks of 128, quantised scales, ")
    assert [line.split()[0] for line in lines if line.startswith(("type", "nf4", "int2"))] == ["type", "nf4", "int2"]
    assert lines[3].split() == ["type", "bits", "error", "quantise", "dequantise"]
    assert "\x1b" not in ended.out
    whole = qlora("inspect", tiny_model, "--types", "nf4", "--layers").out
    for name in linear_weights(tiny_model):
        assert f"\n{name} " in whole
    assert "blocks" not in qlora("inspect", tiny_model, "--types", "int8").out


def test_the_command_runs_as_its_help_says_in_a_process_of_its_own(qlora):
    """For types of ours and of bitsandbytes, whose own chatter does not come through."""
    page = " ".join(qlora("inspect", "--help").out.split())
    words = page.partition("Example: qlora inspect ")[2].partition(" Arguments:")[0].split()
    words[words.index("--types") + 1] += ",int8"
    options = ["--data", "configs/quickstart/heldout.jsonl", "--limit", "4", "--json"]
    command = [sys.executable, "-m", "qlora_cli", "inspect", *words, *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result["types"]) == ["none", "nf4", "int2", "int8"]
    assert all(total["perplexity"] > 1 for total in result["types"].values())
    begins = {line.split()[0] for line in done.stderr.splitlines()}
    assert begins == {"eval", "note", *result["types"]}, done.stderr


def test_the_plot_has_a_line_for_each_type(tiny_model, tmp_path, qlora):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    from qlora_cli.report import error_plot

    for name, begin in (("error.svg", b"<?xml"), ("error.PNG", b"\x89PNG")):
        ended = qlora("inspect", tiny_model, "--types", "nf4,int2", "--plot", tmp_path / name)
        assert ended.code == 0, ended.err
        assert (tmp_path / name).read_bytes().startswith(begin)
    assert "model.layers.1.mlp.down_proj" in (tmp_path / "error.svg").read_text()
    result = measured(tiny_model, ["nf4", "int2"])
    axes = error_plot(result).axes[0]
    assert axes.get_yscale() == "log"
    for line, kind in zip(axes.lines, result["types"], strict=True):
        assert line.get_label().startswith(kind)
        assert list(line.get_ydata()) == [layer["types"][kind]["error"] for layer in result["layers"]]
    assert len({(line.get_linestyle(), line.get_marker()) for line in axes.lines}) == 2, "told apart by colour alone"


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def check_refused(ended: Ended, message: str, code: int = 2) -> None:
    assert (ended.code, ended.out) == (code, ""), ended.err
    assert message in ended.err
    assert ended.err.count("\n") == 1, "one line"


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere/at/all", "nowhere/at/all: no such folder."), ("./file", "file: the base model must be a folder")],
)
def test_a_model_that_is_none(tmp_path, qlora, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    check_refused(qlora("inspect", name), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--types", "nf4,int3"], "--types: `quantization.data_type` is 'int3'. Perhaps int"),
        (["--types", "q4_k_m"], "Give one of nf4, fp4, int4, nf2, int2, int8, none."),
        (["--limit", "3"], "--limit, --max-length: are about the rows of --data."),
        (["--max-length", "3"], "--limit, --max-length: are about the rows of --data."),
        (["--set", "training.epochs=1"], "--set training.epochs=1: sets nothing that counts here."),
        (["--data", "none.jsonl"], "none.jsonl: no such file"),
        (["--plot", "error.gif"], "error.gif: no plot has this ending. End the name in .png or .svg."),
        (["--plot", "none/error.png"], "none/error.png: there is no folder none."),
    ],
)
def test_an_option_that_is_wrong(tiny_model, tmp_path, qlora, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    check_refused(qlora("inspect", tiny_model, *options), message)


def test_data_without_rows(tiny_model, tmp_path, qlora):
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    check_refused(qlora("inspect", tiny_model, "--data", path), "empty.jsonl: ")


def test_problems_are_json_too(tiny_model, qlora):
    ended = qlora("inspect", tiny_model, "--types", "x", "--json")
    assert (ended.code, json.loads(ended.out)["problems"][0]["where"]) == (2, "--types")


def test_a_model_that_is_stored_quantised(tiny_model, tmp_path, qlora):
    folder = shutil.copytree(tiny_model, tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "qlora_packed", "data_type": "int2"}
    (folder / "config.json").write_text(json.dumps(config))
    check_refused(qlora("inspect", folder), "this model is stored quantised. Inspect its full-precision checkpoint.")


def test_a_model_of_which_nothing_can_be_measured(tiny_model, qlora):
    ended = qlora("inspect", tiny_model, "--set", "quantization.skip_modules=['.*']")
    check_refused(ended, f"{tiny_model}: no linear layer to quantise.")


def test_an_existing_file_is_not_overwritten_by_a_plot(tiny_model, tmp_path, qlora):
    path = tmp_path / "thesis.svg"
    path.write_text("<svg/>")
    check_refused(qlora("inspect", tiny_model, "--plot", path), "is there already, and nothing is overwritten", code=3)
    assert path.read_text() == "<svg/>"


def test_a_plot_without_matplotlib_is_refused_before_any_work(tiny_model, tmp_path, qlora, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("qlora_cli.commands.inspect", None)
    ended = qlora("inspect", tiny_model, "--plot", tmp_path / "error.png")
    check_refused(ended, "matplotlib draws it, and is not installed. Run `pip install 'qlora[plot]'`.", code=4)
