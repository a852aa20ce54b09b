"""LoRA adapters as GGUF: the update that llama.cpp computes is PEFT's, and what the format cannot hold is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_cli.errors import UserError
from qlora_cli.export.gguf import check_lora_gguf, write_gguf, write_lora_gguf
from tests.export.gguf_models import CASES, write_lora, write_model

gguf = pytest.importorskip("gguf")


def quiet(note: str) -> None:
    """For `say`."""


def applied(base: Path, lora: Path) -> dict[str, np.ndarray]:
    """The weights of a base file after a LoRA file, as llama.cpp computes them (src/llama-adapter.h, get_scale)."""
    reader = gguf.GGUFReader(lora)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    pairs = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    weights = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(base).tensors}
    for name in {name.rpartition(".")[0] for name in pairs}:
        a, b = pairs[name + ".lora_a"], pairs[name + ".lora_b"]
        weights[name] = weights[name] + alpha / b.shape[1] * (b @ a)
    return weights


@pytest.mark.parametrize("name", ["llama-2", "qwen2", "gemma2"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"up_proj": 3}}],
    ids=["plain", "rslora", "patterns"],
)
def test_base_and_lora_files_make_the_merged_model(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    base = write_model(name, tmp_path / "base")
    merged = write_lora(name, tmp_path / "adapter", **settings).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    CASES[name].tokenizer().save_pretrained(tmp_path / "merged")
    write_gguf(base, tmp_path / "base.gguf", "f32", quiet)
    write_gguf(tmp_path / "merged", tmp_path / "merged.gguf", "f32", quiet)
    said: list[str] = []
    facts = write_lora_gguf(tmp_path / "adapter", base, tmp_path / "lora.gguf", "f32", said.append)
    assert facts["tensors"] == 2 * 7 * 2
    assert bool(said) == bool(settings)
    whole = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "merged.gguf").tensors}
    both = applied(tmp_path / "base.gguf", tmp_path / "lora.gguf")
    assert set(both) == set(whole)
    for tensor, value in whole.items():
        assert np.allclose(both[tensor], value, atol=1e-5), tensor


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A plain adapter of the tiny Llama."""
    write_lora("llama-2", tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("llama-2", tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"use_dora": True}, "DoRA.*Merge it and export the merged model"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save .lm_head."),
        ({"init_lora_weights": "pissa"}, "a start that changed the base"),
        ({"bias": "lora_only"}, "bias"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_what_the_format_cannot_express_is_refused(
    config: dict[str, Any], told: str, adapter: Path, base: Path
) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(UserError, match=told):
        check_lora_gguf(adapter, base)


def test_an_adapter_of_a_base_that_a_start_changed_is_refused(adapter: Path, base: Path) -> None:
    (adapter / "base.json").write_text(json.dumps({"content": "0" * 64}))
    with pytest.raises(UserError, match="LoftQ or PiSSA"):
        check_lora_gguf(adapter, base)


def test_an_adapter_of_another_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    wider = write_model("llama-2", tmp_path / "wide", hidden_size=128)
    with pytest.raises(UserError, match="does not fit"):
        check_lora_gguf(adapter, wider)


def test_a_lora_on_a_tied_head_is_refused(tmp_path: Path) -> None:
    base = write_model("qwen2", tmp_path / "base")
    write_lora("qwen2", tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.raises(UserError, match="no LoRA to lm_head"):
        check_lora_gguf(tmp_path / "adapter", base)


def test_an_adapter_is_stored_in_16_or_32_bits(adapter: Path, base: Path, tmp_path: Path) -> None:
    facts = write_lora_gguf(adapter, base, tmp_path / "lora.gguf", "f16", quiet)
    assert 0 < facts["error"]["F16"] < 1e-3
    with pytest.raises(UserError, match="not stored as 'q8_0'"):
        write_lora_gguf(adapter, base, tmp_path / "other.gguf", "q8_0", quiet)
    with pytest.raises(UserError, match="nothing is overwritten"):
        write_lora_gguf(adapter, base, tmp_path / "lora.gguf", "f16", quiet)
