"""Merged models of every task: loaded as anybody loads them, with a head, and equal to what was trained."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.errors import UserError
from qlora_cli.merge.merge import How, merge_adapter
from qlora_cli.model.adapter import attach_adapter, load_adapter, save_adapter
from qlora_cli.model.base import find_base, load_base
from qlora_cli.model.heads import TASKS, auto_class
from qlora_cli.model.layout import Made
from qlora_cli.model.owner import Owner
from qlora_cli.model.stored_base import Making, on_stored_base, start_folder
from qlora_cli.quant.layers import quantized_modules
from qlora_cli.train.base import quantize_base
from tests.architectures import PAIRS, model_section, outputs, rows_of, shift_adapter, write_architecture

CPU = torch.device("cpu")
CLASSIFY, SPANS = "sequence_classification", "question_answering"


@pytest.fixture
def trained(make_recipe, architecture, tmp_path):
    """An architecture with a random adapter, saved in tmp_path / "adapter": the recipe, the base and the model."""

    def build(name, task, folder=None, **quantization):
        section = model_section(folder or architecture(name), task)
        recipe = make_recipe(model=section, quantization=quantization)
        base = load_base(recipe, CPU)
        model = attach_adapter(base, recipe.adapter)
        shift_adapter(model)
        save_adapter(model, tmp_path / "adapter", Owner(str(base.folder)))
        return recipe, base, model

    return build


def merged(recipe, base, out, dtype=torch.float32, onto="dequantized", modules=None):
    """The merged folder, and what plain transformers loads of it."""
    return merge_adapter(
        base.folder,
        out.parent / "adapter",
        out,
        How(
            recipe.quantization,
            base.compute_dtype,
            onto,
            dtype,
            list(quantized_modules(base.model)) if modules is None else modules,
            made=None if base.task == "causal_lm" else Made(base.task, base.config),
        ),
    )


def loaded(folder, task):
    """The model of a merged folder as anybody loads it, in float32, every tensor of the file used and none missing."""
    model, info = auto_class(task).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model


@pytest.mark.parametrize("data_type", ["nf4", "int2"])
@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_a_merged_model_of_any_task_is_the_unmerged_one(trained, tmp_path, name, task, data_type):
    recipe, base, model = trained(name, task, data_type=data_type)
    wanted = outputs(model, rows_of(task))
    merged(recipe, base, tmp_path / "merged")
    found = loaded(tmp_path / "merged", task)
    assert (outputs(found, rows_of(task)) - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max()))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == [type(base.model).__name__]
    if TASKS[task].has_head:
        assert found.config.num_labels == base.model.config.num_labels
        assert found.config.pad_token_id == base.model.config.pad_token_id
    if task == CLASSIFY:
        assert config["id2label"] == {"0": "no", "1": "perhaps", "2": "yes"}
        assert config["label2id"] == {"no": 0, "perhaps": 1, "yes": 2}
        assert config["problem_type"] == "single_label_classification"


@pytest.mark.parametrize(("name", "task"), [("bert", CLASSIFY), ("bart", "seq2seq_lm"), ("gated_t5", SPANS)])
def test_a_merge_with_quantised_embeddings_and_onto_other_bases(trained, tmp_path, name, task):
    recipe, base, model = trained(name, task, data_type="int2", embeddings="nf4")
    merged(recipe, base, tmp_path / "merged")
    difference = outputs(loaded(tmp_path / "merged", task), rows_of(task)) - outputs(model, rows_of(task))
    assert difference.abs().max() < 1e-4
    merged(recipe, base, tmp_path / "original", onto="original")
    unquantised = load_base(
        recipe.model_copy(
            update={"quantization": recipe.quantization.model_copy(update={"data_type": "none", "embeddings": "none"})}
        ),
        CPU,
    )
    wanted = outputs(load_adapter(unquantised, tmp_path / "adapter"), rows_of(task))
    assert torch.allclose(outputs(loaded(tmp_path / "original", task), rows_of(task)), wanted, atol=1e-4)


@pytest.mark.parametrize(("name", "task"), [("t5", "seq2seq_lm"), ("t5", CLASSIFY), ("bert", SPANS)])
def test_a_merge_of_16_bit_training_adds_to_the_weights_that_were_multiplied_with(trained, tmp_path, name, task):
    recipe, base, model = trained(name, task, data_type="int2", compute_dtype="bfloat16")
    assert base.compute_dtype == torch.bfloat16
    merged(recipe, base, tmp_path / "merged")
    found = loaded(tmp_path / "merged", task)
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert len(layers) == len(quantized_modules(base.model))
    for layer_name, layer in layers.items():
        delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        expected = layer.base_layer.dequantized(torch.bfloat16).float() + delta
        assert torch.allclose(found.get_submodule(layer_name).weight, expected, atol=1e-6)
    with base.compute():
        wanted = outputs(model, rows_of(task)).float()
    assert (outputs(found, rows_of(task)) - wanted).abs().max() < 0.03 * wanted.abs().max()


def test_a_regression_head_is_written_as_one(make_recipe, architecture, tmp_path):
    recipe = make_recipe(model={"name_or_path": str(architecture("bert")), "task": CLASSIFY, "num_labels": 1})
    base = load_base(recipe, CPU)
    save_adapter(attach_adapter(base, recipe.adapter), tmp_path / "adapter", Owner("base"))
    merged(recipe, base, tmp_path / "merged")
    found = loaded(tmp_path / "merged", CLASSIFY)
    assert (found.config.num_labels, found.config.problem_type) == (1, "regression")
    assert found.classifier.out_features == 1


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_sharded_base_gets_its_head_in_the_last_shard(trained, tmp_path, name):
    folder = write_architecture(tmp_path / "base", name)
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = [dict(list(whole.items())[i::2]) for i in range(2)]
    weight_map = {}
    for index, half in enumerate(halves):
        shard = f"model-0000{index + 1}-of-00002.safetensors"
        save_file(half, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(half, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    recipe, base, model = trained(name, CLASSIFY, folder)
    merged(recipe, base, tmp_path / "merged")
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())["weight_map"]
    assert {index[name] for name in base.head.new} == {"model-00002-of-00002.safetensors"}
    wanted = outputs(model, rows_of(CLASSIFY))
    assert torch.allclose(outputs(loaded(tmp_path / "merged", CLASSIFY), rows_of(CLASSIFY)), wanted, atol=1e-5)


def test_the_head_of_a_language_model_is_left_out_and_old_names_are_made_new(trained, tmp_path):
    folder = write_architecture(tmp_path / "base", "bert")
    tensors = load_file(folder / "model.safetensors")
    assert any(name.startswith("cls.") for name in tensors)
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in tensors.items()}
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    recipe, base, model = trained("bert", CLASSIFY, folder)
    merged(recipe, base, tmp_path / "merged")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    found = loaded(tmp_path / "merged", CLASSIFY)
    assert written.keys() == dict(found.named_parameters()).keys()
    assert torch.allclose(outputs(found, rows_of(CLASSIFY)), outputs(model, rows_of(CLASSIFY)), atol=1e-5)


@pytest.mark.parametrize(("name", "task"), [("llama", SPANS), ("t5", CLASSIFY), ("bart", "seq2seq_lm")])
def test_a_merge_onto_a_base_that_a_start_changed(make_recipe, architecture, tmp_path, name, task):
    adapter = {"init": "loftq", "loftq": {"iterations": 1}}
    recipe = make_recipe(
        model=model_section(architecture(name), task), adapter=adapter, quantization={"data_type": "nf2"}
    )
    making = Making(lambda line: None, CPU, tmp_path / "base")
    quantize_base(recipe, find_base(recipe), making.target, making)
    base = load_base(on_stored_base(recipe, making.target), CPU)
    model = load_adapter(base, start_folder(making.target, recipe.adapter), trainable=True)
    shift_adapter(model)
    save_adapter(model, tmp_path / "adapter", Owner(str(making.target)))
    wanted = outputs(model, rows_of(task))
    merged(recipe, base, tmp_path / "merged", modules=())
    assert torch.allclose(outputs(loaded(tmp_path / "merged", task), rows_of(task)), wanted, atol=1e-5)


def test_an_adapter_without_the_head_is_refused(trained, tmp_path):
    recipe, base, _model = trained("bert", CLASSIFY)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.bert.pooler.dense.bias"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights of BertForSequenceClassification are neither .*: bert\.pooler\.de"):
        merged(recipe, base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_task_is_refused(trained, make_recipe, architecture, tmp_path):
    trained("bert", CLASSIFY)
    recipe = make_recipe(model=model_section(architecture("bert"), SPANS))
    with pytest.raises(UserError, match="2 weights of BertForQuestionAnswering are neither in the base nor in"):
        merged(recipe, load_base(recipe, CPU), tmp_path / "merged")
