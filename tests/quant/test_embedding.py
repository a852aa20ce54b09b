"""A packed embedding gives the rows of its stored table, bit for bit; a head tied to it multiplies with them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from qlora_cli.errors import UserError
from qlora_cli.model.base import fingerprint
from qlora_cli.quant.embedding import PackedEmbedding, packed_like
from qlora_cli.quant.layers import layer_values, num_embeddings, quantized_modules, stored_tensors
from qlora_cli.quant.linear import PackedLinear
from qlora_cli.quant.packed import PackedLayer, Storage
from qlora_cli.quant.plugin import PackedConfig, PackedQuantizer
from qlora_cli.recipe.schema import Quantization
from tests.quant.test_linear import STORAGES
from tests.quant.test_plugin import HEADS, KINDS, SHAPE, load, logits

GEMMA = {**SHAPE, **HEADS, "head_dim": 8, "tie_word_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {**KINDS, "gemma3_text": GEMMA}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def embedding_of(storage: Storage, number: int = 21, blocks: int = 2, **factory: Any) -> PackedEmbedding:
    """An embedding with random values."""
    layer = PackedEmbedding(number, blocks * storage.block_size, storage, **factory)
    layer.store(layer.packed_from(drawn(*layer.shape)))
    return layer


def folder_of(kind: str, folder: Any, **changes: Any) -> Any:
    """A tiny random model of an architecture, saved."""
    auto = AutoModelForSeq2SeqLM if kind == "bart" else AutoModelForCausalLM
    torch.manual_seed(0)
    auto.from_config(AutoConfig.for_model(kind, **{**MODELS[kind], **changes})).save_pretrained(folder)
    return folder


@pytest.fixture(params=MODELS)
def folder(request, tmp_path):
    return folder_of(request.param, tmp_path / "base")


# ── the layer ────────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(STORAGES)),
    st.integers(1, 40),
    st.integers(1, 3),
    st.lists(st.integers(0, 39), max_size=12),
    st.sampled_from(DTYPES),
)
def test_rows_are_those_of_the_dequantised_table_to_the_bit(name, number, blocks, chosen, dtype):
    layer = embedding_of(STORAGES[name], number, blocks).to(dtype)
    ids = torch.tensor([one % number for one in chosen], dtype=torch.int64)
    for shaped in (ids, ids[None], ids.int()):
        assert torch.equal(layer(shaped), F.embedding(shaped, layer.dequantized(dtype)))


@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize("bad", [-1, 21])
def test_an_id_that_is_not_in_the_table_is_an_error(name, bad):
    with pytest.raises(IndexError, match="out of range"):
        embedding_of(STORAGES[name])(torch.tensor([0, bad]))


def test_what_comes_out_follows_casts_and_not_autocast_as_of_any_embedding():
    layer = embedding_of(Storage("nf4"), dtype=torch.bfloat16)
    scales = layer.packed.scales.restored()
    ids = torch.tensor([[3, 1]])
    assert layer(ids).dtype == torch.bfloat16
    for how in (torch.float16, torch.float32, "cpu"):
        layer.to(how)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(ids).dtype == (torch.float32 if how == "cpu" else how)
        assert torch.equal(layer.packed.scales.restored(), scales)
    assert embedding_of(Storage("int2"), padding_idx=2).padding_idx == 2


@pytest.mark.parametrize("name", STORAGES)
def test_it_is_saved_loaded_and_copied_without_losing_a_bit(name, tmp_path):
    layer = embedding_of(STORAGES[name])
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    loaded = PackedEmbedding(*layer.shape, STORAGES[name])
    loaded.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    for one in (loaded, copy.deepcopy(layer)):
        assert torch.equal(one.dequantized(), layer.dequantized())
    assert repr(layer) == f"PackedEmbedding(21, {layer.embedding_dim}, {STORAGES[name]})"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [BartScaledWordEmbedding, GemmaTextScaledWordEmbedding, Gemma3TextScaledWordEmbedding])
def test_a_scaled_embedding_of_transformers_stays_scaled_as_it_was(kind, dtype):
    plain = kind(21, 128, 1, embed_scale=55.42)  # no power of two: it is rounded, or not, as in the class
    layer = packed_like(plain.to(dtype), Storage("nf4"))
    assert layer is not None
    layer = layer.to_empty(device="cpu")
    layer.store(layer.packed_from(plain.weight.detach()))
    plain.weight.data = layer.dequantized(dtype)
    ids = torch.arange(21)[None]
    assert layer.padding_idx == 1
    assert torch.equal(layer(ids), plain(ids).detach())


# ── in a model ───────────────────────────────────────────────────────────────────────────────────────────────────────

SETTINGS = {
    "nf4 for all": {"data_type": "nf4", "embeddings": "nf4", "block_size": 32},
    "int2 embedding alone": {"data_type": "none", "embeddings": "int2", "block_size": 16, "double_quant": False},
    "int4 with zero point": {"data_type": "int2", "embeddings": "int4", "zero_point": True, "block_size": 32},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_model_with_a_packed_embedding_is_the_model_with_its_values_and_is_stored_once(folder, name, tmp_path):
    plain, _ = load(folder)
    alone, _ = load(folder, quantization_config=PackedConfig(**{**SETTINGS[name], "embeddings": "none"}))
    packed, told = load(folder, quantization_config=PackedConfig(**SETTINGS[name]))
    assert not any(told.values()), told
    embedding = packed.get_input_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    assert embedding.storage.data_type == SETTINGS[name]["embeddings"]
    wanted = embedding.packed_from(plain.get_input_embeddings().weight.detach())
    assert torch.equal(embedding.weight, wanted.codes)
    assert num_embeddings(packed) == num_embeddings(plain) == 64
    with torch.no_grad():
        alone.get_input_embeddings().weight.copy_(embedding.dequantized())  # and with it what is tied to it
    assert torch.equal(logits(packed), logits(alone))

    shared = [module for module in packed.modules() if isinstance(module, PackedLayer) and module.shared]
    assert bool(shared) == bool(packed.all_tied_weights_keys)
    assert all(module.weight is embedding.weight for module in shared)
    packed.save_pretrained(tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    same = [name for name, tensor in stored.items() if torch.equal(tensor, embedding.weight)]
    assert len(same) == 1, "the codes are stored more than once"
    again, told = load(tmp_path / "packed")
    assert not any(told.values()), told
    assert fingerprint(again) == fingerprint(packed)
    assert torch.equal(logits(again), logits(packed))


def test_a_tied_head_follows_its_embedding_through_casts_and_copies(tmp_path):
    packed, _ = load(folder_of("qwen2", tmp_path), quantization_config=PackedConfig(**SETTINGS["nf4 for all"]))
    held = sum(t.numel() * t.element_size() for kind, t in stored_tensors(packed) if kind in ("nf4", "scales"))
    wanted = logits(packed)
    copied = copy.deepcopy(packed)
    head, embedding = copied.get_output_embeddings(), copied.get_input_embeddings()
    assert isinstance(head, PackedLinear)
    assert head.holder is embedding is not packed.get_input_embeddings()
    assert torch.equal(logits(copied), wanted)
    cast = copied.to(torch.bfloat16)
    assert logits(cast).dtype == torch.bfloat16
    assert head.weight is embedding.weight
    assert sum(t.numel() * t.element_size() for kind, t in stored_tensors(cast) if kind in ("nf4", "scales")) == held
    embedding.weight.data[:] = 0
    assert not torch.equal(logits(cast), wanted.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_merge_writes_the_values_that_are_looked_up(tmp_path, name, dtype):
    quantization = Quantization.model_validate(SETTINGS[name])
    folder = folder_of("qwen2", tmp_path)
    weight = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    packed = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=PackedConfig(**SETTINGS[name])
    )
    found = layer_values(weight, quantization, "model.embed_tokens", dtype, embedding=True)
    assert torch.equal(found, packed.get_input_embeddings()(torch.arange(64)).float())
    assert {"model.embed_tokens", "lm_head"} <= set(quantized_modules(packed))


def test_lora_around_it_learns_under_checkpointing_and_is_saved_alone(tmp_path):
    packed, _ = load(folder_of("qwen2", tmp_path / "base"), quantization_config=PackedConfig(**SETTINGS["nf4 for all"]))
    adapted = get_peft_model(packed, LoraConfig(r=4, target_modules="all-linear"))
    assert not any("lora" in name for name, _ in adapted.named_parameters() if "lm_head" in name or "embed" in name)
    gradients = []
    for how in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if how:
            enable = getattr(adapted, "activation_checkpointing_enable", None) or adapted.gradient_checkpointing_enable
            enable(how)
            adapted.enable_input_require_grads()  # what reentrant checkpointing asks of an embedding
        adapted.train()
        adapted(input_ids=torch.arange(3, 23)[None]).logits.square().mean().backward()
        gradients.append({name: one.grad.clone() for name, one in adapted.named_parameters() if one.requires_grad})
        adapted.zero_grad()
    assert any(grad.abs().sum() > 0 for grad in gradients[0].values())
    assert all(torch.equal(grad, other[name]) for other in gradients for name, grad in gradients[0].items())
    adapted.save_pretrained(tmp_path / "adapter")
    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


# ── checkpoints that hold a tied weight twice, and what is refused ───────────────────────────────────────────────────


@pytest.mark.parametrize("kept", [["model.embed_tokens.weight", "lm_head.weight"], ["lm_head.weight"]])
def test_a_checkpoint_may_have_a_tied_weight_under_either_name_or_both(tmp_path, kept):
    folder = folder_of("qwen2", tmp_path)
    wanted, _ = load(folder, quantization_config=PackedConfig(**SETTINGS["nf4 for all"]))
    tensors = load_file(folder / "model.safetensors")
    weight = tensors.pop("model.embed_tokens.weight")
    save_file({**tensors, **{name: weight.clone() for name in kept}}, folder / "model.safetensors", {"format": "pt"})
    found, told = load(folder, quantization_config=PackedConfig(**SETTINGS["nf4 for all"]))
    assert not any(told.values()), told
    assert fingerprint(found) == fingerprint(wanted)


def test_a_checkpoint_whose_head_is_not_the_embedding_that_it_is_tied_to_is_refused(tmp_path):
    folder = folder_of("qwen2", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"]  # the same codes, other scales
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"is not model.embed_tokens.weight, to which config.json ties it"):
        load(folder, quantization_config=PackedConfig(**SETTINGS["nf4 for all"]))


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path):
    message = r"model.embed_tokens.weight: has rows of 32 values, which is no multiple of quantization.block_size 64"
    with pytest.raises(UserError, match=message):
        load(folder_of("llama", tmp_path), quantization_config=PackedConfig("none", embeddings="nf4"))


class Doubled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: model.set_input_embeddings(Doubled(64, 32)), "model.embed_tokens is a Doubled, which cannot be"),
        (
            lambda model: model.set_input_embeddings(nn.Embedding(64, 32, max_norm=1.0)),
            "model.embed_tokens is a Embedding, which cannot be",
        ),
        (
            lambda model: model.set_output_embeddings(nn.Linear(32, 64)),
            "lm_head is a Linear with a bias, which cannot be packed with the embedding",
        ),
    ],
)
def test_a_layer_that_does_more_than_it_packs_is_refused_by_its_name(make, message):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **KINDS["qwen2"]))
    make(model)
    quantizer = PackedQuantizer(PackedConfig("none", embeddings="nf4", block_size=32), pre_quantized=False)
    with pytest.raises(UserError, match=message):
        quantizer.preprocess_model(model)


def test_an_embedding_that_is_not_finite_is_named(tmp_path):
    folder = folder_of("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model.embed_tokens.weight: holds NaN or infinity"):
        load(folder, quantization_config=PackedConfig(**SETTINGS["nf4 for all"]))
