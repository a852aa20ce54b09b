"""Names of a checkpoint in the live model: as loading itself finds them."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file

from qlora_cli.model.heads import auto_class
from qlora_cli.model.names import key_mapping, live_names, renamer
from tests.architectures import PAIRS


def on_meta(folder, task):
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return auto_class(task).from_config(config)


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_every_tensor_that_loading_takes_has_the_name_that_it_takes(architecture, name, task):
    folder = architecture(name)
    model, tensors = on_meta(folder, task), load_file(folder / "model.safetensors")
    found = live_names(model, tensors)
    mapping = key_mapping(model) or None
    loaded, info = auto_class(task).from_pretrained(folder, output_loading_info=True, key_mapping=mapping)
    assert set(found) == set(tensors) - set(info["unexpected_keys"])
    values = dict(loaded.named_parameters(remove_duplicate=False)) | dict(loaded.named_buffers())
    assert all(torch.equal(values[live], tensors[stored]) for stored, live in found.items())


def test_a_prefix_more_or_less_and_the_names_of_2018(architecture):
    live = renamer(on_meta(architecture("bert"), "sequence_classification"))
    norm = "bert.encoder.layer.0.output.LayerNorm"
    assert live(f"{norm}.weight") == live(f"{norm}.gamma") == f"{norm}.weight"
    assert live("encoder.layer.0.output.LayerNorm.beta") == f"{norm}.bias"
    assert live("cls.predictions.bias") is None
    bare = transformers.BertModel(transformers.BertConfig(num_hidden_layers=1, hidden_size=24))
    assert renamer(bare)("bert.encoder.layer.0.output.dense.weight") == "encoder.layer.0.output.dense.weight"


def test_only_a_decoder_with_a_span_head_calls_the_bare_model_otherwise(architecture):
    mapped = {pair for pair in PAIRS if key_mapping(on_meta(architecture(pair[0]), pair[1]))}
    assert mapped == {("llama", "question_answering")}
