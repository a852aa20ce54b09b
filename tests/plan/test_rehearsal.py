"""A rehearsal on shapes alone against the same step on real tensors, as torch's profiler saw it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from torch.nn.functional import scaled_dot_product_attention

from qlora_cli.model.base import load_config
from qlora_cli.plan.ledger import Ledger
from qlora_cli.plan.meta_base import meta_model
from qlora_cli.plan.rehearsal import KINDS, Shape, rehearse, rehearse_model
from qlora_cli.plan.stand_in import standing_in
from tests.architectures import write_architecture
from tests.plan.measured import measured_peak, recipe_for
from tests.tiny import write_tiny_model

ONE, PADDED, PACKED = Shape((384,)), Shape((256, 200, 130)), Shape((256, 200, 130), packed=True)
BF16, FP32 = {"compute_dtype": "bfloat16"}, {"compute_dtype": "float32"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "vocab_size": 4096}
    return write_tiny_model(tmp_path_factory.mktemp("llama"), **sizes)


def config_of(folder: Path, recipe: Any) -> Any:
    return load_config(folder, recipe.model)


CASES = {
    "nf4 in fp32": (ONE, 0, {"quantization": FP32}),
    "nf4 in bf16, padded, recomputed": (PADDED, 3, {"quantization": BF16}),
    "nf4 in bf16, packed, two layers recomputed": (PACKED, 2, {"quantization": BF16}),
    "nf4 with dropout, recomputed": (PADDED, 3, {"quantization": FP32, "adapter": {"dropout": 0.1}}),
    "16 bits, padded": (PADDED, 0, {"quantization": {**BF16, "data_type": "none"}}),
    "fp32, packed, recomputed": (PACKED, 3, {"quantization": {**FP32, "data_type": "none"}}),
    "packed 4-bit layers": (ONE, 3, {"quantization": {**BF16, "data_type": "int4"}}),
    "second micro-batch of a step": (ONE, 3, {"quantization": BF16, "training": {"gradient_accumulation_steps": 2}}),
    "DoRA, which PEFT computes": (ONE, 0, {"quantization": BF16, "adapter": {"use_dora": True}}),
    "int8": (ONE, 0, {"quantization": {**BF16, "data_type": "int8"}}),
    "a head that is trained": (ONE, 0, {"quantization": BF16, "adapter": {"modules_to_save": ["lm_head"]}}),
    "attention with all scores": (PADDED, 0, {"quantization": BF16, "model": {"attn_implementation": "eager"}}),
    "a third of the tokens trained": (Shape((384, 300), trained=0.3), 0, {"quantization": BF16}),
    "a class": (PADDED, 0, {"quantization": BF16, "model": {"task": "sequence_classification", "num_labels": 3}}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_rehearsal_holds_what_the_real_step_holds(case: str, llama: Path):
    shape, checkpointed, sections = CASES[case]
    recipe = recipe_for(llama, **{name: dict(section) for name, section in sections.items()})
    held, taken = measured_peak(recipe, shape, checkpointed)
    peak = rehearse(recipe, config_of(llama, recipe), shape, "cpu", checkpointed)
    there = peak.by_kind["weights"] + peak.by_kind["adapter"]
    assert there == held
    assert peak.num_bytes - there == pytest.approx(taken, rel=0.01)


@pytest.mark.parametrize(
    ("name", "task", "sizes"),
    [
        ("t5", "seq2seq_lm", {"d_model": 128, "d_ff": 512}),
        ("bert", "question_answering", {"hidden_size": 128, "intermediate_size": 512, "max_position_embeddings": 300}),
        ("gpt2", "causal_lm", {"n_embd": 128, "n_positions": 300}),
    ],
)
def test_other_architectures_and_tasks_are_rehearsed_too(name: str, task: str, sizes: Any, tmp_path: Path):
    folder = write_architecture(tmp_path / "model", name, **sizes)
    recipe = recipe_for(folder, model={"task": task}, quantization=dict(BF16))
    shape = Shape((300, 214))
    held, taken = measured_peak(recipe, shape, 0)
    peak = rehearse(recipe, config_of(folder, recipe), shape, "cpu", 0)
    assert peak.num_bytes == pytest.approx(held + taken, rel=0.02)


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_on_a_gpu_is_rehearsed_where_there_is_none(packed: bool, llama: Path):
    recipe = recipe_for(llama, quantization=dict(BF16))
    shape = Shape((256, 200), packed)
    peak = rehearse(recipe, config_of(llama, recipe), shape, "cuda")
    assert set(peak.by_kind) == set(KINDS)
    assert peak.by_kind["activations"] > 0
    assert peak.num_bytes == sum(peak.by_kind.values())
    assert torch.cuda.is_available() or not torch.cuda.is_initialized()


def test_each_layer_that_is_recomputed_saves_memory_but_the_last(llama: Path):
    recipe = recipe_for(llama, quantization=dict(BF16))
    found = meta_model(recipe, config_of(llama, recipe), "cpu")
    held = [rehearse_model(found, recipe, ONE, "cpu", layers).num_bytes for layers in range(4)]
    assert held[0] > held[1] > held[2] >= held[3]


def test_a_model_is_rehearsed_again_with_the_same_result(llama: Path):
    recipe = recipe_for(llama, quantization=dict(BF16))
    found = meta_model(recipe, config_of(llama, recipe), "cpu")
    first = rehearse_model(found, recipe, PADDED, "cpu", 1)
    rehearse_model(found, recipe, PACKED, "cpu", 3)
    again = rehearse_model(found, recipe, PADDED, "cpu", 1)
    assert (first.by_kind, first.where) == (again.by_kind, again.where)


def test_the_place_of_the_peak_is_told_in_words(llama: Path):
    recipe = recipe_for(llama, quantization=dict(BF16))
    words = {rehearse(recipe, config_of(llama, recipe), ONE, "cpu", layers).where for layers in (0, 3)}
    assert all(word.split(" of ")[-1].removeprefix("recomputing ") in PLACES for word in words)


PLACES = ("the embedding", "layer 0", "layer 1", "layer 2", "the head", "optimizer step")


def test_nothing_is_left_of_a_rehearsal(llama: Path):
    recipe = recipe_for(llama, quantization=dict(BF16))
    before = dict(vars(torch.Tensor)), torch.clear_autocast_cache, torch.cuda._lazy_init
    rehearse(recipe, config_of(llama, recipe), ONE, "cuda")
    assert (dict(vars(torch.Tensor)), torch.clear_autocast_cache, torch.cuda._lazy_init) == before
    query = torch.empty(1, 2, 8, 16, device="meta")
    assert query.device.type == "meta"
    assert scaled_dot_product_attention(query, query, query).shape == query.shape
    assert not any(table.is_meta for table in functional.name2qmap.values())
    weight = torch.randn(64, 64)
    codes, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    assert (functional.dequantize_4bit(codes, state) - weight).norm() < 0.12 * weight.norm()


def test_an_error_within_leaves_nothing_either():
    before = dict(vars(torch.Tensor))
    with pytest.raises(ZeroDivisionError), standing_in("cuda"):
        _ = 1 / 0
    assert dict(vars(torch.Tensor)) == before


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_autocast_casts_meta_tensors_as_it_does_real_ones(kind: str):
    x, weight = torch.randn(4, 8, device="meta"), torch.nn.Parameter(torch.randn(8, 8, device="meta"))
    with standing_in(kind), Ledger(kind), torch.autocast(kind, dtype=torch.bfloat16):
        assert torch.nn.functional.linear(x, weight).dtype == torch.bfloat16
        assert (x @ weight).dtype == torch.bfloat16
        assert torch.nn.functional.mse_loss(x.bfloat16(), x.bfloat16()).dtype == torch.float32
        norm = torch.nn.functional.layer_norm(x.bfloat16(), (8,)).dtype
        assert norm == (torch.float32 if kind == "cuda" else torch.bfloat16)
    with standing_in(kind), Ledger(kind):
        assert torch.nn.functional.linear(x, weight).dtype == torch.float32
