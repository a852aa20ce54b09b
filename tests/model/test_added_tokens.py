"""Added tokens: their ids and rows are the same at every load, and train as plain PEFT trains them."""

from __future__ import annotations

import json
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora_cli.errors import UserError
from qlora_cli.kernels.linear_cross_entropy import linear_cross_entropy, reference_linear_cross_entropy
from qlora_cli.model.adapter import attach_adapter, load_adapter, save_adapter
from qlora_cli.model.added_tokens import Rows, mean_row
from qlora_cli.model.base import Base, find_base, fingerprint, load_base
from qlora_cli.model.heads import auto_class
from qlora_cli.model.owner import Owner
from qlora_cli.model.placement import _hosted
from tests.architectures import outputs, rows_of, shift_adapter, write_architecture
from tests.tiny import write_tiny_gpt2, write_tiny_model

CPU = torch.device("cpu")
TOKENS = ["<think>", "</think>", "<Zahl>"]
FIRST = 259
KINDS = [
    ("untied", "causal_lm"),
    ("llama", "causal_lm"),
    ("gpt2", "causal_lm"),
    ("bart", "seq2seq_lm"),
    ("t5", "seq2seq_lm"),
    ("own_head", "seq2seq_lm"),
    ("bert", "sequence_classification"),
    ("bart", "sequence_classification"),
    ("t5", "question_answering"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, architecture):
    """Models by name: those of tests/architectures.py, and a Llama and a T5 each with a head of its own."""
    root = tmp_path_factory.mktemp("models")
    own = {"untied": write_tiny_model(root / "untied"), "own_head": write_architecture(root / "own_head", "gated_t5")}
    config = json.loads((own["own_head"] / "config.json").read_text()) | {"tie_word_embeddings": False}
    config.pop("scale_decoder_outputs")
    (own["own_head"] / "config.json").write_text(json.dumps(config))
    tensors = load_file(own["own_head"] / "model.safetensors")
    tensors["lm_head.weight"] = tensors["shared.weight"].flip(0).contiguous()
    save_file(tensors, own["own_head"] / "model.safetensors", {"format": "pt"})
    return lambda name: own.get(name) or architecture(name)


@pytest.fixture
def make(make_recipe, folders):
    """A recipe with TOKENS on a model by its name."""

    def made(name: str, task: str = "causal_lm", tokens: list[str] = TOKENS, **sections: Any) -> Any:
        model = {"name_or_path": str(folders(name)), "task": task, "added_tokens": tokens}
        model |= {"num_labels": 3} if task == "sequence_classification" else {}
        quantization = {"compute_dtype": "float32", **sections.pop("quantization", {})}
        return make_recipe(model=model, quantization=quantization, **sections)

    return made


def batch(task: str, ids: tuple[int, ...]) -> dict[str, Tensor]:
    """A batch with the added tokens in its rows, and among its targets where it has tokens for them."""
    found = rows_of(task)
    found["input_ids"][:, 3 : 3 + len(ids)] = torch.tensor(ids)
    if task.endswith("_lm"):
        found["labels"][:, 3 : 3 + len(ids)] = torch.tensor(ids)
    return found


def trained(base: Base, recipe: Any) -> Any:
    torch.manual_seed(0)
    model = attach_adapter(base, recipe.adapter)
    shift_adapter(model)
    return model.train()


def gradients(model: Any, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss, and the gradient of every trained weight by its name."""
    model.zero_grad()
    loss = model(**rows).loss
    loss.backward()
    named = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"loss": loss.detach(), **named}


def as_peft_has_them(model: Any) -> Any:
    """The same model with PEFT's own layers of trained rows."""
    for module in model.modules():
        if isinstance(module, Rows):
            module.__class__ = type(module).__mro__[2]
    return model


def test_the_tokenizer_finds_the_tokens_and_shows_them(make):
    tokenizer = find_base(make("untied")).tokenizer
    ids = tokenizer("so <think>na</think>")["input_ids"]
    assert [index for index in ids if index >= FIRST] == [FIRST, FIRST + 1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "so <think>na</think>"


def test_a_token_that_is_there_already_is_refused(make):
    with pytest.raises(UserError, match=r"model.added_tokens: '<\|im_end\|>' is in the tokenizer already, with id 2"):
        find_base(make("untied", tokens=["<a>", "<|im_end|>"]))


@pytest.mark.parametrize(("name", "task"), KINDS)
def test_every_load_gives_the_same_base_and_draws_nothing(make, name, task):
    recipe = make(name, task)
    states = []
    for one in (make(name, task, tokens=[]), recipe):
        torch.manual_seed(11)
        second = load_base(one, CPU)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    first = load_base(recipe, CPU)
    assert fingerprint(first.model) == fingerprint(second.model)
    table = first.model.get_input_embeddings().weight
    assert first.added_ids == (FIRST, FIRST + 1, FIRST + 2)
    assert len(table) == FIRST + 3
    mean = table[:FIRST].double().mean(0)
    assert torch.allclose(table[FIRST:].double(), mean.expand(3, -1), atol=1e-7)


def test_rows_that_pad_the_embedding_are_used_and_it_keeps_its_size(make_recipe, tmp_path):
    folder = write_tiny_model(tmp_path / "padded", vocab_size=264)
    base = load_base(make_recipe(model={"name_or_path": str(folder), "added_tokens": TOKENS}), CPU)
    plain = load_base(make_recipe(model={"name_or_path": str(folder)}), CPU)
    table, before = (one.model.get_input_embeddings().weight for one in (base, plain))
    assert table.shape == before.shape
    assert torch.equal(table[:FIRST], before[:FIRST])
    assert torch.equal(table[FIRST + 3 :], before[FIRST + 3 :])
    assert torch.equal(table[FIRST], mean_row(before, FIRST).float())
    assert torch.equal(table[FIRST : FIRST + 3], table[FIRST].expand(3, -1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "task"), KINDS)
def test_gradients_are_those_of_plain_peft(make, name, task, dtype):
    recipe = make(name, task, quantization={"compute_dtype": dtype})
    base = load_base(recipe, CPU)
    model = trained(base, recipe)
    rows = batch(task, base.added_ids)
    with base.compute():
        ours = gradients(model, rows)
        theirs = gradients(as_peft_has_them(model), rows)
    tolerance = 1e-5 if dtype == "float32" else 0.03
    rows_trained = [name for name in ours if "trainable_tokens" in name]
    assert len(rows_trained) == (2 if name == "untied" else 1)
    for key, found in ours.items():
        assert (found - theirs[key]).norm() <= tolerance * theirs[key].norm(), key
    assert all(ours[key].norm() > 0 for key in rows_trained)


@pytest.mark.parametrize("name", ["untied", "llama"])
def test_the_loss_from_hidden_states_has_the_same_gradients(make, name):
    recipe = make(name)
    base = load_base(recipe, CPU)
    model = trained(base, recipe)
    head = base.model.get_output_embeddings()
    assert isinstance(head.token_adapter, Rows)
    assert base.tail is not None
    targets = torch.tensor([5, FIRST, 7, FIRST + 2, 9])
    found = []
    for loss in (linear_cross_entropy, reference_linear_cross_entropy):
        hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        model.zero_grad()
        value = loss(hidden, targets, head)
        value.backward()
        rows = [p.grad for p in head.parameters() if p.requires_grad]
        found.append([value.detach(), hidden.grad, *rows])
    assert len(found[0]) == 3
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_an_embedding_in_host_memory_gives_the_same(make):
    """As training.memory leaves it there: its class looks up on the host, and the rows are where the model computes."""
    recipe = make("untied")
    wanted = batch("causal_lm", (FIRST, FIRST + 1))
    plain = trained(load_base(recipe, CPU), recipe)
    base = load_base(recipe, CPU)
    table = base.model.get_input_embeddings()
    table.__class__ = _hosted(nn.Embedding)
    hosted = trained(base, recipe)
    for key, found in gradients(hosted, wanted).items():
        assert torch.equal(found, gradients(plain, wanted)[key]), key


@pytest.mark.parametrize(("name", "task"), KINDS)
def test_an_adapter_is_loaded_as_it_was_saved(make, tmp_path, name, task):
    recipe = make(name, task)
    base = load_base(recipe, CPU)
    model = trained(base, recipe).eval()
    save_adapter(model, tmp_path / "adapter", Owner(str(base.folder)))
    rows = batch(task, base.added_ids)
    wanted = outputs(model, rows)
    assert torch.equal(outputs(load_adapter(load_base(recipe, CPU), tmp_path / "adapter"), rows), wanted)
    again = load_adapter(load_base(recipe, CPU), tmp_path / "adapter", trainable=True)
    assert torch.equal(outputs(again, rows), wanted)
    shared = {id(p) for name, p in again.named_parameters() if "trainable_tokens" in name}
    assert len(shared) == (2 if name == "untied" else 1)


@pytest.mark.parametrize(
    ("name", "task"), [kind for kind in KINDS if kind[1].endswith("_lm") and kind[0] != "own_head"]
)
def test_a_plain_peft_user_resizes_and_loads(make, tmp_path, name, task):
    recipe = make(name, task, quantization={"data_type": "none"})
    base = load_base(recipe, CPU)
    model = trained(base, recipe).eval()
    save_adapter(model, tmp_path / "adapter", Owner(str(base.folder)))
    base.tokenizer.save_pretrained(tmp_path / "adapter")
    theirs = auto_class(task).from_pretrained(base.folder, dtype=torch.float32)
    theirs.resize_token_embeddings(len(base.tokenizer))
    found = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    rows = batch(task, base.added_ids)
    wanted = outputs(model, rows)
    assert (outputs(found, rows) - wanted).norm() <= 1e-6 * wanted.norm()


def test_an_adapter_of_other_tokens_is_refused(make, tmp_path):
    recipe, fewer, none = make("untied"), make("untied", tokens=TOKENS[:2]), make("untied", tokens=[])
    for name, one in (("three", recipe), ("two", fewer), ("none", none)):
        base = load_base(one, CPU)
        save_adapter(attach_adapter(base, one.adapter), tmp_path / name, Owner(str(base.folder)))
    with pytest.raises(UserError, match="the adapter trains token 261, and the base has 261 rows"):
        load_adapter(load_base(fewer, CPU), tmp_path / "three")
    with pytest.raises(UserError, match=r"its tokens are \[259, 260, 261\], and the adapter trains \[259, 260\]"):
        load_adapter(load_base(recipe, CPU), tmp_path / "two")
    with pytest.raises(UserError, match="names 3 tokens, and the adapter has no rows for them"):
        load_adapter(load_base(recipe, CPU), tmp_path / "none")


def test_rows_of_tokens_that_the_base_knows_are_loaded_too(make, tmp_path):
    """Of an adapter that plain PEFT trained."""
    recipe = make("llama", tokens=[])
    theirs = auto_class("causal_lm").from_pretrained(recipe.model.name_or_path, dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[7, 5])
    theirs = peft.get_peft_model(theirs, config)
    shift_adapter(theirs)
    theirs.save_pretrained(tmp_path)
    rows = rows_of("causal_lm")
    rows["input_ids"][:, 3:5] = torch.tensor([5, 7])
    base = load_base(make("llama", tokens=[], quantization={"data_type": "none"}), CPU)
    wanted = outputs(theirs.eval(), rows)
    assert (outputs(load_adapter(base, tmp_path), rows) - wanted).norm() <= 1e-6 * wanted.norm()


def test_tied_rows_that_differ_are_refused(make, tmp_path):
    recipe = make("bart", "sequence_classification")
    base = load_base(recipe, CPU)
    save_adapter(attach_adapter(base, recipe.adapter), tmp_path, Owner(str(base.folder)))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.model.decoder.embed_tokens.token_adapter.trainable_tokens_delta"] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="other rows for the head, or for a second name of the embedding"):
        load_adapter(load_base(recipe, CPU), tmp_path)


@pytest.mark.parametrize("name", ["untied", "llama"])
@pytest.mark.parametrize("change", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_a_table_is_changed_in_one_way_alone(make, name, change):
    recipe = make(name, adapter={"r": 4, **change})
    with pytest.raises(UserError, match=r"trains rows of lm_head, and .* changes it too \(lm_head\)"):
        attach_adapter(load_base(recipe, CPU), recipe.adapter)


def test_a_quantised_head_is_refused(make):
    recipe = make("untied", quantization={"skip_modules": []})
    with pytest.raises(UserError, match=r"lm_head is quantised, .* Add lm_head to quantization.skip_modules"):
        load_base(recipe, CPU)


def test_a_head_with_a_bias_is_refused(make_recipe, tmp_path, monkeypatch):
    folder = write_tiny_gpt2(tmp_path)
    own = transformers.GPT2LMHeadModel.__init__

    def with_bias(self: Any, config: Any) -> None:
        own(self, config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=True)
        self.post_init()

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "__init__", with_bias)
    model = transformers.GPT2LMHeadModel(transformers.AutoConfig.from_pretrained(folder))
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="the head has a bias, which PEFT leaves out"):
        load_base(make_recipe(model={"name_or_path": str(folder), "added_tokens": TOKENS}), CPU)


def test_a_tokenizer_that_is_too_large_by_itself_is_still_refused(make_recipe, tmp_path):
    folder = write_tiny_model(tmp_path / "small", vocab_size=258)
    with pytest.raises(UserError, match="the tokenizer's largest id is 258, the embedding has 258 rows"):
        load_base(make_recipe(model={"name_or_path": str(folder), "added_tokens": TOKENS}), CPU)


def test_a_t5_with_a_head_of_its_own_keeps_it(make):
    """Resizing by transformers 5.23 alone puts the embedding in its place."""
    plain, base = (load_base(make("own_head", "seq2seq_lm", tokens=tokens), CPU).model for tokens in ([], TOKENS))
    assert not torch.equal(plain.lm_head.weight, plain.shared.weight)
    assert torch.equal(base.lm_head.weight[:FIRST], plain.lm_head.weight)
    assert torch.equal(base.shared.weight[:FIRST], plain.shared.weight)


def test_switched_off_the_rows_are_the_bases(make):
    recipe = make("untied")
    base = load_base(recipe, CPU)
    rows = batch("causal_lm", base.added_ids)
    wanted = outputs(base.model, rows)
    model = trained(base, recipe).eval()
    assert not torch.allclose(outputs(model, rows), wanted)
    with model.disable_adapter():
        assert torch.equal(outputs(model, rows), wanted)
