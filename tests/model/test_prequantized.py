"""Bases that are stored quantised: bitsandbytes' own everywhere, GPTQ and AWQ where their package is installed."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
import torch

from qlora_cli.errors import Exit, UserError
from qlora_cli.model.base import find_base, fingerprint
from qlora_cli.quant.layers import quantized_modules
from tests.stored_bases import (
    AWQ,
    GPTQ,
    TOKENS,
    loaded,
    needs_package,
    package_is_there,
    say_stored,
    store_by_bitsandbytes,
    trained,
    write_stored,
)
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def stored_by_bitsandbytes(tmp_path_factory) -> Path:
    """The tiny model saved by transformers in bitsandbytes' nf4, which is to multiply in bfloat16."""
    plain = write_tiny_model(tmp_path_factory.mktemp("nf4") / "plain")
    return store_by_bitsandbytes(plain, plain.with_name("stored"))


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({}, "gptqmodel is not installed"),
        ({"gptqmodel": "7.6.0"}, "optimum is not installed"),
        ({"gptqmodel": "5.8.0", "optimum": "2.3.0"}, r"gptqmodel 5\.8\.0 is older than 7\.0\.0"),
    ],
)
def test_without_its_package_one_line_says_what_to_install(method, versions, said, make_recipe, tmp_path, monkeypatch):
    def version(package: str) -> str:
        if package not in versions:
            raise metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(metadata, "version", version)
    folder = write_tiny_model(tmp_path / "model")
    say_stored(folder, {"quant_method": method, **GPTQ})
    with pytest.raises(UserError, match=rf"{method.upper()}, and {said}\. Run `pip install 'qlora\[gptq\]'`") as error:
        find_base(make_recipe(model={"name_or_path": str(folder)}))
    assert error.value.code == Exit.ENVIRONMENT
    assert "\n" not in str(error.value)


@pytest.mark.skipif(package_is_there(), reason="gptqmodel is installed here")
def test_the_missing_package_is_told_before_any_data_is_read(qlora, tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    say_stored(folder, {"quant_method": "gptq", **GPTQ})
    (tmp_path / "rows.jsonl").write_text("no row\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{name_or_path: {folder}}}\ndata: {{train: [{{path: rows.jsonl}}]}}\n")
    ended = qlora("train", recipe, "--set", f"output_dir={tmp_path / 'run'}")
    assert ended.code == Exit.ENVIRONMENT
    assert "pip install 'qlora[gptq]'" in ended.err
    assert "rows.jsonl" not in ended.err


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
            "bitsandbytes, 4 bits stored as bfloat16",
        ),
        ({"bits": 4}, "unknown"),
        ([4], "unknown"),
    ],
)
def test_other_stored_forms_are_refused_by_name(stored, said, make_recipe, tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    say_stored(folder, stored)
    with pytest.raises(UserError, match=rf"already quantised \({said}\), which is not available yet"):
        find_base(make_recipe(model={"name_or_path": str(folder)}))


def test_a_bitsandbytes_checkpoint_is_the_base_that_quantising_gives(make_recipe, stored_by_bitsandbytes):
    base = loaded(make_recipe, stored_by_bitsandbytes)
    wanted = loaded(make_recipe, stored_by_bitsandbytes.with_name("plain"), data_type="nf4")
    assert fingerprint(base.model) == fingerprint(wanted.model)
    (model, found), (_, grads) = trained(make_recipe, base), trained(make_recipe, wanted)
    assert found.keys() == grads.keys()
    assert all(torch.equal(found[name], grads[name]) for name in grads)
    assert model(TOKENS).logits.dtype == torch.float32
    layers = quantized_modules(base.model).values()
    assert {layer.compute_dtype for layer in layers} == {torch.float32}, "the recipe's, not the checkpoint's"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_stored_from_another_type_computes_in_the_recipes(dtype, make_recipe, tmp_path):
    folder = store_by_bitsandbytes(write_tiny_model(tmp_path / "plain"), tmp_path / "stored", dtype=torch.float16)
    base, wanted = loaded(make_recipe, folder, compute_dtype=dtype), getattr(torch, dtype)
    states = [layer.weight.quant_state for layer in quantized_modules(base.model).values()]
    assert {state.dtype for state in states} == {wanted}
    assert {one.dtype for one in base.model.parameters() if one.is_floating_point()} == {wanted}
    seen: list[torch.dtype] = []
    base.model.model.norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    with base.compute():
        base.model(TOKENS)
    assert seen == [wanted]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"quantization": {"data_type": "fp4"}}, r"quantization\.data_type: fp4 has no effect"),
        ({"quantization": {"double_quant": False}}, r"quantization\.double_quant: false has no effect"),
        ({"adapter": {"init": "loftq"}}, r"adapter\.init: loftq needs the unquantised weights"),
        ({"adapter": {"init": "pissa"}}, r"adapter\.init: pissa needs the unquantised weights"),
    ],
)
def test_what_a_stored_base_cannot_follow_is_refused(section, said, make_recipe, stored_by_bitsandbytes):
    with pytest.raises(UserError, match=said):
        find_base(make_recipe(model={"name_or_path": str(stored_by_bitsandbytes)}, **section))


@needs_package
@pytest.mark.parametrize(("method", "stored"), [("gptq", GPTQ), ("awq", AWQ)])
def test_a_stored_base_trains_and_is_evaluated(method, stored, qlora, rows_file, heldout_file, tmp_path):
    folder, _ = write_stored(tmp_path, method, stored)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
model: {{name_or_path: {folder}}}
quantization: {{compute_dtype: float32}}
adapter: {{r: 4, alpha: 8}}
data: {{train: [{{path: {rows_file}}}], max_length: 256}}
training: {{max_steps: 2, micro_batch_size: 2, gradient_accumulation_steps: 1, optimizer: adamw, logging_steps: 1}}
output_dir: {tmp_path / "run"}
"""
    )
    ended = qlora("train", recipe)
    assert ended.code == Exit.DONE, ended.err
    ended = qlora("eval", tmp_path / "run", "--json", "--set", f"data.eval=[{{path: {heldout_file}}}]")
    assert ended.code == Exit.DONE, ended.err
    assert json.loads(ended.out), "and nothing of the package on stdout"
