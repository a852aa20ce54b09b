"""GGUF files: what is in them, what is refused, nothing half-written is left. Real llama.cpp: verify_gguf.sh."""

from __future__ import annotations

import json
import re
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.errors import Exit, UserError
from qlora_cli.export import gguf as export
from qlora_cli.export.gguf import FILE_TYPES, check_gguf, write_gguf
from qlora_cli.export.gguf_architectures import ARCHITECTURES, load_config, rope_factors
from qlora_cli.export.gguf_tensors import interleaved
from tests.export.gguf_models import CASES, write_model

gguf = pytest.importorskip("gguf")

OWN = [name for name, kind in FILE_TYPES.items() if not kind.by_tool]


def quiet(note: str) -> None:
    """For `say`."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every tiny model as a folder."""
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(name, root / name) for name in CASES}


def copy_of(folder: Path, target: Path, **config: Any) -> Path:
    """A folder with other keys in its config.json."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    values = json.loads((folder / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(values))
    return target


def keys_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def test_every_architecture_has_a_tiny_model(folders: dict[str, Path]) -> None:
    named = {json.loads((path / "config.json").read_text())["architectures"][0] for path in folders.values()}
    assert named == set(ARCHITECTURES)


@pytest.mark.parametrize("name", CASES)
def test_a_file_has_every_weight_and_an_error_that_its_type_allows(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    facts = write_gguf(folders[name], tmp_path / "model.gguf", "f32", quiet)
    stored = load_file(folders[name] / "model.safetensors")
    tensors = tensors_of(tmp_path / "model.gguf")
    extra = 1 if name == "llama-3" else 0  # the frequencies of its rope
    assert facts["tensors"] == len(tensors) == len(stored) + extra
    assert facts["error"] == {"F32": 0.0}
    assert sum(tensor.size for tensor in tensors.values()) == sum(t.numel() for t in stored.values()) + 8 * extra
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("file_type", OWN)
def test_each_type_is_read_back_with_the_error_of_that_type(
    file_type: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "model.gguf"
    facts = write_gguf(folders["llama-2"], out, file_type, quiet)
    lowest, highest = {"f32": (0, 0), "f16": (1e-5, 3e-4), "bf16": (1e-4, 3e-3), "q8_0": (1e-3, 1e-2)}.get(
        file_type, (0.03, 0.12)
    )
    assert lowest <= facts["error"][file_type.upper()] <= highest
    assert facts["bytes"] == out.stat().st_size
    assert keys_of(out)["general.file_type"] == FILE_TYPES[file_type].code
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out).tensors}
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["output.weight"] == ("Q8_0" if file_type == "q4_0" else file_type.upper())
    assert kinds["blk.1.ffn_down.weight"] == file_type.upper()


def test_the_file_types_have_the_numbers_of_llama_cpp() -> None:
    for name, kind in FILE_TYPES.items():
        known = gguf.LlamaFileType
        assert kind.code == (known.ALL_F32 if name == "f32" else known[f"MOSTLY_{name.upper()}"])


def test_q_and_k_of_a_llama_are_interleaved_and_gemma_norms_are_one_more(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    write_gguf(folders["llama-3"], tmp_path / "llama.gguf", "f32", quiet)
    stored, written = load_file(folders["llama-3"] / "model.safetensors"), tensors_of(tmp_path / "llama.gguf")
    key = stored["model.layers.1.self_attn.k_proj.weight"]  # 2 heads of 16 rows
    assert np.array_equal(written["blk.1.attn_k.weight"][:4], key[[0, 8, 1, 9]])
    assert np.array_equal(written["blk.1.attn_k.weight"][16:18], key[[16, 24]])
    assert np.array_equal(written["blk.1.attn_q.bias"][:2], stored["model.layers.1.self_attn.q_proj.bias"][[0, 8]])
    assert np.array_equal(written["blk.1.attn_v.weight"], stored["model.layers.1.self_attn.v_proj.weight"])
    write_gguf(folders["gemma"], tmp_path / "gemma.gguf", "f32", quiet)
    norm = load_file(folders["gemma"] / "model.safetensors")["model.norm.weight"]
    assert np.array_equal(tensors_of(tmp_path / "gemma.gguf")["output_norm.weight"], norm + 1)


def test_interleaving_is_its_own_inverse_for_two_rows_a_head_and_keeps_every_row() -> None:
    rows = torch.arange(24).reshape(12, 2)
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 6, 2, 8, 4, 10, 12, 18, 14, 20, 16, 22]
    assert torch.equal(interleaved(rows, 6), rows)


def test_a_tied_head_is_not_written_and_an_untied_one_is(folders: dict[str, Path], tmp_path: Path) -> None:
    write_gguf(folders["qwen2"], tmp_path / "tied.gguf", "q4_0", quiet)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "tied.gguf").tensors}
    assert "output.weight" not in kinds
    assert kinds["token_embd.weight"] == "Q8_0"  # it serves as the output layer
    write_gguf(folders["qwen3"], tmp_path / "untied.gguf", "f32", quiet)
    assert "output.weight" in tensors_of(tmp_path / "untied.gguf")


def test_the_llama_3_rope_is_that_of_transformers(folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = load_config(folders["llama-3"])
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    plain = 1 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / torch.tensor(rope_factors(config)), scaled, rtol=1e-5)
    assert rope_factors(load_config(folders["qwen2"])) is None


def test_hyperparameters_that_llama_cpp_reads_are_in_the_file(folders: dict[str, Path], tmp_path: Path) -> None:
    keys = {}
    for name in ("llama-yarn", "gemma2", "gemma3"):
        write_gguf(folders[name], tmp_path / f"{name}.gguf", "f16", quiet)
        keys[name] = keys_of(tmp_path / f"{name}.gguf")
    yarn, two, three = keys.values()
    assert (yarn["llama.rope.scaling.type"], yarn["llama.rope.scaling.original_context_length"]) == ("yarn", 32)
    assert yarn["llama.rope.scaling.attn_factor"] == pytest.approx(1.3 / (1 + 0.1 * np.log(4)))
    assert (two["gemma2.attn_logit_softcapping"], two["gemma2.final_logit_softcapping"]) == (50.0, 30.0)
    assert three["gemma3.attention.sliding_window_pattern"] == [True, False, True]
    assert (three["gemma3.rope.freq_base"], three["gemma3.rope.freq_base_swa"]) == (100000.0, 10000.0)
    assert three["general.architecture"] == "gemma3"


@pytest.mark.parametrize(
    ("name", "config", "told"),
    [
        ("llama-2", {"architectures": ["GPTNeoXForCausalLM"]}, "GGUF is not available for GPTNeoXForCausalLM"),
        ("llama-2", {"architectures": None}, "a config.json without architectures"),
        ("llama-2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'.* computes silu"),
        ("llama-2", {"quantization_config": {"quant_method": "bitsandbytes"}}, "stored quantised"),
        ("llama-2", {"num_hidden_layers": 3}, "no tensor for llama.cpp's blk.2.attn_k.weight"),
        ("llama-2", {"vocab_size": 500}, "config.json asks for .500, 64."),
        ("llama-2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "not available"),
        ("qwen2", {"head_dim": 32}, "head_dim is 32.*takes hidden_size"),
        ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar is 99.*scales by 32"),
        ("gemma2", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ("qwen3", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0,
                   "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
         "not available in llama.cpp's qwen3"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_ignore_is_refused_before_anything_is_written(
    name: str, config: dict[str, Any], told: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy_of(folders[name], tmp_path / "other", **config)
    with pytest.raises(UserError, match=told):
        check_gguf(folder, "f16")
    with pytest.raises(UserError, match=told):
        write_gguf(folder, tmp_path / "model.gguf", "f16", quiet)
    assert not list(tmp_path.glob("*.gguf"))


def test_a_tensor_without_a_place_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(folders["qwen3"], tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(64)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"qwen3 has no place for tensor model\.layers\.0\.self_attn\.o_proj\.bias"):
        check_gguf(folder, "f16")


def test_a_window_that_llama_cpp_does_not_keep_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    said: list[str] = []
    folder = copy_of(folders["mistral"], tmp_path / "other", sliding_window=64)
    write_gguf(folder, tmp_path / "model.gguf", "f16", said.append)
    assert any("a window of 64" in line for line in said)


def test_an_unknown_type_and_a_missing_tool_are_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"unknown type 'q5'.*q8_0"):
        check_gguf(folders["llama-2"], "q5")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"only llama.cpp's llama-quantize writes q4_k_m") as error:
        check_gguf(folders["llama-2"], "q4_k_m")
    assert error.value.code == Exit.ENVIRONMENT


def test_without_the_package_the_install_command_is_told(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=re.escape("pip install 'qlora[export]'")) as error:
        check_gguf(folders["llama-2"], "f16")
    assert error.value.code == Exit.ENVIRONMENT


def test_a_k_quant_is_written_by_the_tool_and_its_intermediate_file_goes(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "bin" / "llama-quantize"
    tool.parent.mkdir()
    tool.write_text(
        f'#!{sys.executable}\nimport shutil, sys\nassert sys.argv[3] == "Q4_K_M"\nshutil.copy(*sys.argv[1:3])\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent))
    facts = write_gguf(folders["llama-2"], tmp_path / "model.gguf", "q4_k_m", quiet)
    assert facts["error"] == {"Q4_K_M": 0.0}  # this tool copies
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "model.gguf"]
    tool.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no such type')\n")
    with pytest.raises(UserError, match="exit code 1: no such type"):
        write_gguf(folders["llama-2"], tmp_path / "other.gguf", "q4_k_m", quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "model.gguf"]


def test_nothing_is_overwritten(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(UserError, match="nothing is overwritten"):
        write_gguf(folders["llama-2"], tmp_path / "model.gguf", "f16", quiet)
    assert (tmp_path / "model.gguf").read_text() == "mine"


@pytest.mark.parametrize("room", [1_000, 60_000, 150_000])
def test_a_full_disk_in_mid_write_leaves_nothing(room: int, folders: dict[str, Path], tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))  # Python ignores SIGXFSZ: writes fail with EFBIG
    try:
        with pytest.raises(UserError, match=r"cannot write: .* bytes are needed") as error:
            write_gguf(folders["llama-2"], tmp_path / "model.gguf", "f32", quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.code == Exit.FAILED
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_what_was_written_is_thrown_away(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def spoil(plan: Any, path: Path, out: Path) -> None:
        write(plan, path, out)
        data = bytearray(path.read_bytes())
        data[-200] ^= 0x7F
        path.write_bytes(data)

    write = export.write_file
    monkeypatch.setattr(export, "write_file", spoil)
    with pytest.raises(UserError, match=r"read back, output_norm.weight has other bytes than were written") as error:
        write_gguf(folders["llama-2"], tmp_path / "model.gguf", "f32", quiet)
    assert error.value.code == Exit.FAILED
    assert not list(tmp_path.iterdir())


def test_a_weight_that_a_type_cannot_hold_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(folders["llama-2"], tmp_path / "large")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"ffn_up.weight has weights that are not finite in F16"):
        write_gguf(folder, tmp_path / "model.gguf", "f16", quiet)
    assert not list(tmp_path.glob("*gguf*"))
    write_gguf(folder, tmp_path / "model.gguf", "bf16", quiet)
