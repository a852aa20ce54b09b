"""What a task asks of a model: its class, its labels, and a new head that is the same at every load and never coded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_cli.errors import UserError
from qlora_cli.model.base import find_base, load_base
from qlora_cli.model.heads import TASKS, can, find_head, is_encoder
from qlora_cli.quant.layers import quantized_modules
from tests.architectures import PAIRS, PUBLISHED, TASKS_OF, model_section, outputs, rows_of, write_architecture
from tests.tiny import tiny_tokenizer

CPU = torch.device("cpu")
CLASSIFY = "sequence_classification"
HEADS = {
    ("bert", CLASSIFY): {"classifier", "bert.pooler"},
    ("roberta", CLASSIFY): {"classifier"},
    ("deberta", CLASSIFY): {"classifier", "pooler"},
    ("bart", CLASSIFY): {"classification_head"},
    ("t5", CLASSIFY): {"classification_head"},
    ("gated_t5", CLASSIFY): {"classification_head"},
    ("gpt2", CLASSIFY): {"score"},
    ("llama", CLASSIFY): {"score"},
}


@pytest.fixture
def load(make_recipe, architecture):
    """Loads an architecture for a task; `seed` and `model` go into the recipe, `quantization` too."""

    def build(name, task, *, seed=7, folder=None, model=None, **quantization):
        section = model_section(folder or architecture(name), task) | (model or {})
        recipe = make_recipe(model=section, training={"seed": seed}, quantization=quantization)
        return load_base(recipe, CPU)

    return build


def test_the_table_names_classes_of_transformers_and_tasks_of_peft():
    import peft

    for task in TASKS.values():
        assert hasattr(transformers, task.auto_class)
        assert task.peft_type in peft.TaskType.__members__


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_architecture_can_do_what_it_was_built_for(architecture, name):
    config = transformers.AutoConfig.from_pretrained(architecture(name))
    assert {task for task in TASKS if can(config, task)} == set(TASKS_OF[name])
    assert is_encoder(config) == (name in ("bert", "roberta", "deberta"))


def test_an_encoder_that_is_configured_as_a_decoder_is_a_language_model():
    assert can(transformers.BertConfig(is_decoder=True), "causal_lm")


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("bert", "seq2seq_lm", r"is an encoder \(bert\), which cannot do seq2seq_lm\. Choose from sequence_class"),
        ("bert", "causal_lm", r"is an encoder \(bert\), which cannot do causal_lm"),
        ("bart", "causal_lm", r"is an encoder-decoder \(bart\), which cannot do causal_lm\. Choose from seq2seq_lm, "),
        ("gpt2", "seq2seq_lm", r"is a decoder \(gpt2\), which cannot do seq2seq_lm\. Choose from causal_lm, "),
    ],
)
def test_a_task_that_the_architecture_cannot_do_is_one_message(load, name, task, message):
    with pytest.raises(UserError, match=rf"model\.task: .*{message}"):
        load(name, task)


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_the_head_is_what_the_task_adds_and_no_part_of_it_is_quantised(load, architecture, name, task):
    base = load(name, task, data_type="int2")
    expected = HEADS.get((name, task), {"qa_outputs"} if TASKS[task].has_head else set())
    assert set(base.head.modules) == expected
    assert not [module for module in quantized_modules(base.model) if module in base.head]
    assert quantized_modules(base.model)
    published = getattr(transformers, PUBLISHED[name][0]).from_pretrained(architecture(name))
    new = sum(p.numel() for n, p in base.model.named_parameters() if n in base.head)
    assert base.head.new == {n for n, _ in base.model.named_parameters() if n in base.head}
    assert new == 0 if not expected else new < sum(p.numel() for p in published.parameters()) / 10
    assert all(module in base.summary for module in expected)
    assert {p.dtype for n, p in base.model.named_parameters() if n in base.head} <= {torch.float32}


@pytest.mark.parametrize(("name", "task"), [("bert", CLASSIFY), ("roberta", CLASSIFY), ("gpt2", "question_answering")])
@pytest.mark.parametrize("data_type", ["nf4", "none"])
def test_a_new_head_comes_from_the_recipes_seed_alone(load, name, task, data_type):
    def head(seed=7):
        base = load(name, task, seed=seed, data_type=data_type, compute_dtype="bfloat16")
        return torch.cat([p.flatten() for n, p in sorted(base.model.named_parameters()) if n in base.head])

    torch.manual_seed(0)
    first = head()
    torch.manual_seed(1)
    assert torch.equal(head(), first)
    assert not torch.equal(head(seed=8), first)
    assert not torch.equal(first, first.bfloat16().float()), "it is no bfloat16 value: the start is not rounded"


def test_a_new_head_starts_as_its_class_starts_it(load):
    base = load("roberta", CLASSIFY)
    classifier = base.model.classifier
    assert classifier.dense.weight.std().item() == pytest.approx(0.1, rel=0.1)  # initializer_range
    assert not classifier.dense.bias.any()
    assert not classifier.out_proj.bias.any()


def test_a_head_in_the_checkpoint_is_kept_and_only_what_it_lacks_is_new(load, tmp_path):
    folder = write_architecture(tmp_path / "base", "roberta")
    config = transformers.AutoConfig.from_pretrained(folder, num_labels=3)
    finetuned = transformers.RobertaForSequenceClassification.from_pretrained(folder, config=config)
    finetuned.save_pretrained(folder)
    base = load("roberta", CLASSIFY, folder=folder)
    assert not base.head.new
    assert torch.equal(base.model.classifier.out_proj.weight, finetuned.classifier.out_proj.weight)
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.out_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    base = load("roberta", CLASSIFY, folder=folder)
    assert base.head.new == {"classifier.out_proj.weight"}
    assert torch.equal(base.model.classifier.dense.weight, finetuned.classifier.dense.weight)
    assert not torch.equal(base.model.classifier.out_proj.weight, finetuned.classifier.out_proj.weight)


def test_a_head_for_another_number_of_labels_names_both(load, tmp_path):
    folder = write_architecture(tmp_path / "base", "roberta")
    config = transformers.AutoConfig.from_pretrained(folder, num_labels=5)
    transformers.RobertaForSequenceClassification.from_pretrained(folder, config=config).save_pretrained(folder)
    with pytest.raises(UserError, match=r"classifier\.out_proj\..*: the checkpoint has a head for 5 labels, the recip"):
        load("roberta", CLASSIFY, folder=folder)


def test_a_head_of_another_width_is_refused(load, tmp_path):
    folder = write_architecture(tmp_path / "base", "llama")
    tensors = load_file(folder / "model.safetensors") | {"score.weight": torch.zeros(3, 32)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"score\.weight: it is \[3, 32\] in the checkpoint, and the model has \[3, 6"):
        load("llama", CLASSIFY, folder=folder)


def test_a_pooler_of_the_checkpoint_belongs_to_the_base(load, tmp_path):
    folder = write_architecture(tmp_path / "base", "bert")
    transformers.BertModel.from_pretrained(folder, add_pooling_layer=True).save_pretrained(folder)
    base = load("bert", CLASSIFY, folder=folder, data_type="int2")
    assert base.head.modules == ("classifier",)
    assert "bert.pooler.dense" in quantized_modules(base.model)


def test_weights_that_would_be_random_outside_the_head_are_refused(load, shared, tmp_path):
    """As published, tinystories-656k has lm_head.weight alone: transformers finds no embedding for a classifier."""
    folder = tmp_path / "656k"
    shutil.copytree(shared / "weights" / "tinystories-656k-hf", folder)
    tiny_tokenizer().save_pretrained(folder)
    load("llama", CLASSIFY, folder=folder)  # with the tensor renamed it loads
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights would be random, not pretrained: model\.embed_tokens\.weight"):
        load("llama", CLASSIFY, folder=folder)


def test_labels_become_the_configs_and_a_number_alone_gives_them_no_names(make_recipe, architecture):
    folder = architecture("bert")

    def config(**model):
        return find_base(make_recipe(model={"name_or_path": str(folder), "task": CLASSIFY, **model})).config

    named = config(labels=["no", "yes"])
    assert (named.num_labels, named.id2label, named.label2id) == (2, {0: "no", 1: "yes"}, {"no": 0, "yes": 1})
    assert named.problem_type == "single_label_classification"
    numbered = config(num_labels=4)
    assert (numbered.num_labels, numbered.id2label[3]) == (4, "LABEL_3")
    assert config(num_labels=1).problem_type == "regression"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["yes", "no"], r"in another order: \['yes', 'no'\], and the checkpoint's classes are \['no', 'yes'\]"),
        (
            ["bad", "good"],
            r"other names: \['bad', 'good'\], and the checkpoint's classes are \['no', 'yes'\] in the orde",
        ),
    ],
)
def test_classes_that_the_checkpoint_names_otherwise_are_refused(make_recipe, tmp_path, labels, message):
    names = {"id2label": {1: "yes", 0: "no"}, "label2id": {"no": 0, "yes": 1}}
    folder = write_architecture(tmp_path / "base", "bert", **names)

    def config(**model):
        return find_base(make_recipe(model={"name_or_path": str(folder), "task": CLASSIFY, **model})).config

    with pytest.raises(UserError, match=rf"model\.labels: {message}.*Set model\.labels to \['no', 'yes'\], and let"):
        config(labels=labels)
    assert config(labels=["no", "yes"]).id2label == {0: "no", 1: "yes"}
    assert config(num_labels=2).id2label == {0: "no", 1: "yes"}
    assert config(labels=["no", "perhaps", "yes"]).num_labels == 3  # a head for two is refused by its shape


def test_span_prediction_has_two_labels_whatever_the_checkpoint_was_for(load, tmp_path):
    folder = write_architecture(tmp_path / "base", "bert", num_labels=5)
    assert load("bert", "question_answering", folder=folder).model.qa_outputs.out_features == 2


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("has_pad", [True, False])
def test_a_decoder_reads_its_class_off_the_last_token_before_the_padding(load, architecture, tmp_path, name, has_pad):
    folder = shutil.copytree(architecture(name), tmp_path / name)
    if not has_pad:
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = None
        tokenizer.save_pretrained(folder)
    base = load(name, CLASSIFY, folder=folder)
    pad = base.model.config.pad_token_id
    assert pad == (0 if has_pad else 2) == base.config.pad_token_id
    batch = rows_of(CLASSIFY)
    lengths = batch["attention_mask"].sum(1) - 1  # rows end with eos, which is the padding where there is no other
    ids = batch["input_ids"].masked_fill(torch.arange(batch["input_ids"].shape[1]) >= lengths[:, None], pad)
    together = outputs(base.model, {"input_ids": ids, "attention_mask": (ids != pad).long()})
    alone = [outputs(base.model, {"input_ids": row[None, :n]}) for row, n in zip(ids, lengths, strict=True)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_decoder_without_any_padding_is_one_message_before_a_row_is_read(make_recipe, architecture, tmp_path, name):
    folder = shutil.copytree(architecture(name), tmp_path / name)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    recipe = make_recipe(model=model_section(folder, CLASSIFY))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    with pytest.raises(
        UserError, match=r"neither a pad_token nor an eos_token, so .*\. Set pad_token in tokenizer_con"
    ):
        find_base(recipe)
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 5}))
    assert find_base(recipe).config.pad_token_id == 5


@pytest.mark.parametrize("name", ["bart", "t5"])
@pytest.mark.parametrize("start", [None, "absent"])
def test_a_config_without_the_decoders_start_is_refused_before_a_row_is_read(
    make_recipe, architecture, tmp_path, name, start
):
    folder = shutil.copytree(architecture(name), tmp_path / name)
    config = json.loads((folder / "config.json").read_text()) | {"decoder_start_token_id": None}
    if start == "absent":
        del config["decoder_start_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    find_base(make_recipe(model=model_section(folder, CLASSIFY)))  # it starts no text
    recipe = make_recipe(model=model_section(folder, "seq2seq_lm"))
    if name == "bart" and start == "absent":
        assert find_base(recipe).config.decoder_start_token_id == 2  # transformers' default of BART
        return
    with pytest.raises(UserError, match=r"the model's config has no decoder_start_token_id\. Set it in config\.json"):
        find_base(recipe)


def test_an_encoder_keeps_its_padding(load, tmp_path):
    folder = write_architecture(tmp_path / "base", "roberta", pad_token_id=1)
    assert load("roberta", CLASSIFY, folder=folder).model.config.pad_token_id == 1


def test_a_base_stored_quantised_without_the_head_is_refused(make_recipe, load, architecture, tmp_path):
    recipe = make_recipe(model={"name_or_path": str(architecture("gpt2"))}, quantization={"data_type": "int2"})
    load_base(recipe, CPU).model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    section = model_section(tmp_path, CLASSIFY)
    with pytest.raises(UserError, match=r"stored quantised, and without score\.weight, which sequence_classifi"):
        load_base(make_recipe(model=section), CPU)


def test_without_weights_all_of_the_head_is_new(make_recipe, architecture, tmp_path):
    shutil.copy(architecture("bert") / "config.json", tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path, num_labels=3)
    recipe = make_recipe(model=model_section(tmp_path, CLASSIFY))
    assert set(find_head(tmp_path, config, recipe.model).modules) == HEADS["bert", CLASSIFY]


def test_a_skipped_name_of_the_user_stays_skipped_beside_the_head(load):
    base = load("bert", CLASSIFY, data_type="int2", skip_modules="query")
    assert not [name for name in quantized_modules(base.model) if "query" in name or name in base.head]
    assert len(quantized_modules(base.model)) == 10


def test_the_norms_of_a_bert_of_2018_are_found_under_their_old_names(load, tmp_path):
    folder = write_architecture(tmp_path / "base", "bert")
    wanted = outputs(load("bert", CLASSIFY, folder=folder).model, rows_of(CLASSIFY))
    tensors = load_file(folder / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    assert old.keys() != tensors.keys()
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(outputs(load("bert", CLASSIFY, folder=folder).model, rows_of(CLASSIFY)), wanted)


def test_a_model_that_transformers_cannot_build_is_refused(make_recipe, architecture, tmp_path):
    folder = shutil.copytree(architecture("bert"), tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text()) | {"num_attention_heads": 7}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="transformers cannot build this model: The hidden size"):
        load_base(make_recipe(model=model_section(folder, CLASSIFY)), CPU)


def test_position_and_type_embeddings_are_never_quantised(load):
    for name in ("bert", "deberta", "bart", "t5"):
        base = load(name, CLASSIFY, data_type="int2", embeddings="int2")
        plain = {n: m for n, m in base.model.named_modules() if type(m) is nn.Embedding}
        assert plain or name == "bart", name
        assert all(module.weight.is_floating_point() for module in plain.values())
