"""Merged folders against the unmerged model (plain transformers + bitsandbytes + PEFT) and against PEFT's own merge."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from merge_models import ADAPTERS, ROWS, logits_of, quantized_modules, save_adapter, storage, unmerged
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_cli.errors import Exit, UserError
from qlora_cli.merge.difference import compare
from qlora_cli.merge.merge import How, merge_adapter
from qlora_cli.quant.linear4bit import work_round_cpu_dequantize

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def merged_model(folder, dtype):
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    assert model.dtype == dtype
    return model.eval()


def merge(
    base, adapter, out, live, *, data_type="nf4", double_quant=True, compute=FP32, dtype=FP32, onto="dequantized"
):
    return merge_adapter(
        base,
        adapter,
        out,
        How(storage(data_type, double_quant), compute, onto, dtype, quantized_modules(live)),
    )


def relative(live, merged):
    """Largest relative L2 difference of a row's logits."""
    pairs = zip(logits_of(live, ROWS), logits_of(merged, ROWS), strict=True)
    return max(((one - other).norm() / one.norm()).item() for one, other in pairs)


def greedy(model):
    prompt = torch.tensor([ROWS[1]])
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings).tolist()


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize(("data_type", "double_quant"), [("nf4", True), ("fp4", False), ("none", False)])
def test_fp32_logits_are_those_of_the_unmerged_model(folders, tmp_path, name, data_type, double_quant):
    live = unmerged(folders / "llama", folders / f"adapter-{name}", data_type, FP32, double_quant)
    done = merge(
        folders / "llama",
        folders / f"adapter-{name}",
        tmp_path / "out",
        live,
        data_type=data_type,
        double_quant=double_quant,
    )
    merged = merged_model(tmp_path / "out", FP32)
    assert relative(live, merged) < 1e-5
    assert greedy(live) == greedy(merged)
    assert done.num_changed == 14 + (name == "modules_to_save")


def test_int8_differs_only_by_the_quantised_activations(folders, tmp_path):
    live = unmerged(folders / "llama", folders / "adapter-default", "int8", FP32)
    merge(folders / "llama", folders / "adapter-default", tmp_path / "out", live, data_type="int8")
    merged = merged_model(tmp_path / "out", FP32)
    assert relative(live, merged) < 0.05
    for module in live.modules():
        module.training = True  # bitsandbytes' CPU training path dequantises and leaves activations alone
    live.config.use_cache = False
    assert relative_in_mode(live, merged) < 1e-5


def relative_in_mode(live, merged):
    with torch.no_grad():
        pairs = [[m(input_ids=torch.tensor([row])).logits for m in (live, merged)] for row in ROWS]
    return max(((one - other).norm() / one.norm()).item() for one, other in pairs)


@pytest.mark.parametrize("base", ["llama", "bf16"])
def test_bf16_merge_of_a_bf16_run_is_as_near_as_bf16_allows(folders, tmp_path, base):
    live = unmerged(folders / base, folders / "adapter-default", "nf4", BF16)
    merge(folders / base, folders / "adapter-default", tmp_path / "out", live, compute=BF16, dtype=BF16)
    difference = compare(logits_of(live, ROWS), logits_of(merged_model(tmp_path / "out", BF16), ROWS))
    assert (
        difference.mean_kl < 2e-3
    )  # measured 5.2e-4, of which 3.6e-4 are bf16 activations; onto the published weights: 0.26
    assert difference.top1_agreement > 0.9


def test_fp32_merge_of_a_bf16_run_holds_exactly_the_rounded_base(folders, tmp_path):
    """With B = 0 the merged tensors are the live ones: dequantised linears; norms and embeddings rounded to bf16."""
    live = unmerged(folders / "llama", None, "nf4", BF16)
    adapter = shutil.copytree(folders / "adapter-default", tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in tensors.items()},
        adapter / "adapter_model.safetensors",
    )
    merge(folders / "llama", adapter, tmp_path / "out", live, compute=BF16)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    from bitsandbytes.functional import dequantize_4bit

    for name, parameter in live.named_parameters():
        state = getattr(parameter, "quant_state", None)
        value = parameter if state is None else dequantize_4bit(parameter.data, state)
        assert torch.equal(merged[name], value.float()), name


@pytest.mark.parametrize("name", ["default", "rslora", "patterns", "modules_to_save", "dora"])
def test_onto_the_original_is_peft_s_merge(folders, tmp_path, name):
    base = AutoModelForCausalLM.from_pretrained(folders / "llama", dtype=FP32)
    expected = PeftModel.from_pretrained(base, folders / f"adapter-{name}").merge_and_unload().state_dict()
    live = unmerged(folders / "llama", None, "nf4", FP32)
    merge(folders / "llama", folders / f"adapter-{name}", tmp_path / "out", live, onto="original")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == expected.keys()
    for key in got:
        if name == "dora":
            torch.testing.assert_close(got[key], expected[key], rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(got[key], expected[key]), key


@pytest.mark.parametrize("name", ["default", "dora"])
@pytest.mark.parametrize("data_type", ["nf4", "none"])
def test_gpt2_with_its_transposed_weights(folders, tmp_path, name, data_type):
    adapter = folders / f"adapter-gpt2-{name}"
    live = unmerged(folders / "gpt2", adapter, data_type, FP32)
    merge(folders / "gpt2", adapter, tmp_path / "out", live, data_type=data_type)
    merged = merged_model(tmp_path / "out", FP32)
    assert relative(live, merged) < 1e-5
    assert greedy(live) == greedy(merged)


def test_gpt2_as_on_the_hub_without_its_prefix_and_with_buffers(folders, tmp_path):
    base = shutil.copytree(folders / "gpt2", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    mask = torch.tril(torch.ones(1, 1, 128, 128)) / 3
    bare = {k.removeprefix("transformer."): v for k, v in tensors.items()} | {"h.0.attn.bias": mask}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    live = unmerged(folders / "gpt2", folders / "adapter-gpt2-default", "nf4", FP32)
    merge(base, folders / "adapter-gpt2-default", tmp_path / "out", live, dtype=BF16)
    merge(folders / "gpt2", folders / "adapter-gpt2-default", tmp_path / "full", live, dtype=BF16)
    bare, full = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "full"))
    assert torch.equal(bare.pop("h.0.attn.bias"), mask)  # copied through in its own dtype
    assert {f"transformer.{name}" for name in bare} == set(full)
    assert all(torch.equal(full[f"transformer.{name}"], tensor) for name, tensor in bare.items())


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the fault is in the AVX-512 kernel")
def test_awkward_widths_agree_once_the_live_layers_are_worked_round(folders, tmp_path):
    live = unmerged(folders / "awkward", folders / "adapter-awkward", "nf4", FP32)
    merge(folders / "awkward", folders / "adapter-awkward", tmp_path / "out", live)
    merged = merged_model(tmp_path / "out", FP32)
    assert relative(live, merged) > 0.01
    assert len(work_round_cpu_dequantize(live)) == 14
    assert relative(live, merged) < 1e-5


def test_shards_keep_their_layout_and_values(folders, tmp_path):
    live = unmerged(folders / "llama", None, "nf4", FP32)
    seen = []
    done = merge_adapter(
        folders / "sharded",
        folders / "adapter-default",
        tmp_path / "out",
        How(storage(), FP32, "dequantized", BF16, quantized_modules(live)),
        on_tensor=lambda name, num_bytes: seen.append((name, num_bytes)),
    )
    merge(folders / "llama", folders / "adapter-default", tmp_path / "single", live, dtype=BF16)
    index, before = (
        json.loads((folder / "model.safetensors.index.json").read_text())
        for folder in (tmp_path / "out", folders / "sharded")
    )
    assert index["weight_map"] == before["weight_map"]
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == before["metadata"]["total_size"] // 2 == done.num_bytes
    assert sum(num_bytes for _, num_bytes in seen) == done.num_bytes
    assert len(seen) == done.num_tensors == len(index["weight_map"])
    one, many = (merged_model(tmp_path / name, BF16).state_dict() for name in ("single", "out"))
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_the_folder_is_an_ordinary_one(folders, tmp_path):
    base = shutil.copytree(folders / "tied", tmp_path / "base")
    adapter = shutil.copytree(folders / "adapter-default", tmp_path / "adapter")
    (base / "tokenizer.json").write_text("base")
    (base / "vocab.json").write_text("base")
    config = json.loads((base / "config.json").read_text()) | {"torch_dtype": "float32"}
    (base / "config.json").write_text(json.dumps(config))
    live = unmerged(folders / "tied", None, "nf4", FP32)
    (adapter / "chat_template.jinja").write_text("adapter")
    merge(base, adapter, tmp_path / "one", live, dtype=BF16)
    assert (tmp_path / "one" / "tokenizer.json").read_text() == "base"
    assert (tmp_path / "one" / "chat_template.jinja").read_text() == "adapter"
    (adapter / "tokenizer.json").write_text("adapter")
    merge(base, adapter, tmp_path / "two", live, dtype=BF16)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (tmp_path / "two" / "tokenizer.json").read_text() == "adapter"
    written = json.loads((tmp_path / "two" / "config.json").read_text())
    assert written["dtype"] == "bfloat16"
    assert "torch_dtype" not in written
    assert "quantization_config" not in written
    assert (tmp_path / "two").stat().st_mode & 0o777 == (tmp_path / "base").stat().st_mode & 0o777


def test_tied_embeddings_stay_tied(folders, tmp_path):
    adapter = save_adapter(folders / "tied", tmp_path / "adapter")
    live = unmerged(folders / "tied", adapter, "nf4", FP32)
    merge(folders / "tied", adapter, tmp_path / "out", live)
    merged = merged_model(tmp_path / "out", FP32)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert relative(live, merged) < 1e-5


@pytest.mark.parametrize("make", [lambda out: out.write_text("x"), lambda out: (out.mkdir(), (out / "f").touch())])
def test_nothing_that_exists_is_overwritten(folders, tmp_path, make):
    make(tmp_path / "out")
    live = unmerged(folders / "llama", None, "nf4", FP32)
    with pytest.raises(UserError, match="it exists and is not an empty folder; nothing is overwritten"):
        merge(folders / "llama", folders / "adapter-default", tmp_path / "out", live)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_used(folders, tmp_path):
    (tmp_path / "out").mkdir()
    live = unmerged(folders / "llama", None, "nf4", FP32)
    merge(folders / "llama", folders / "adapter-default", tmp_path / "out", live)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_quantised_module_that_the_base_lacks_is_named(folders, tmp_path):
    with pytest.raises(UserError, match=r"no tensor for the quantised weight model\.layers\.9\.up\.weight"):
        merge_adapter(
            folders / "llama",
            folders / "adapter-default",
            tmp_path / "out",
            How(storage(), FP32, "dequantized", FP32, ["model.layers.9.up"]),
        )


def test_weights_beyond_float16_fail_and_leave_nothing(folders, tmp_path):
    adapter = shutil.copytree(folders / "adapter-default", tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"] *= 1e7
    save_file(tensors, adapter / "adapter_model.safetensors")
    live = unmerged(folders / "llama", None, "nf4", FP32)
    with pytest.raises(
        UserError, match=r"up_proj\.weight is not finite in torch\.float16\. .erge in bfloat16"
    ) as caught:
        merge(folders / "llama", adapter, tmp_path / "out", live, dtype=FP16)
    assert caught.value.code == Exit.FAILED
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    merge(folders / "llama", adapter, tmp_path / "out", live, dtype=BF16)


def test_too_small_a_disk_is_known_before_anything_is_written(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    live = unmerged(folders / "llama", None, "nf4", FP32)
    with pytest.raises(UserError, match=r"[\d,]+ bytes are needed and 1,000 are free") as caught:
        merge(folders / "llama", folders / "adapter-default", tmp_path / "out", live)
    assert caught.value.code == Exit.FAILED
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_the_user_s_error(folders, tmp_path):
    (tmp_path / "file").write_text("in the way")
    live = unmerged(folders / "llama", None, "nf4", FP32)
    with pytest.raises(UserError, match=r"cannot write: .*; [\d,]+ bytes are needed") as caught:
        merge(folders / "llama", folders / "adapter-default", tmp_path / "file" / "out", live)
    assert caught.value.code == Exit.FAILED


MEMORY = """
import json, resource, sys, torch
from pathlib import Path
from transformers import LlamaConfig
from merge_models import storage
from qlora_cli.merge.merge import How, merge_adapter
from qlora_cli.model.safetensors_stream import Entry, SafetensorsWriter

def base(folder, width, ffn, vocab):
    folder.mkdir()
    config = LlamaConfig(hidden_size=width, intermediate_size=ffn, num_hidden_layers=1, num_attention_heads=8,
        vocab_size=vocab, tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    p = "model.layers.0."
    shapes = {p + f"self_attn.{n}_proj.weight": (width, width) for n in "qkvo"}
    shapes |= {p + "mlp.gate_proj.weight": (ffn, width), p + "mlp.up_proj.weight": (ffn, width)}
    shapes |= {p + "mlp.down_proj.weight": (width, ffn)}
    shapes |= {"model.embed_tokens.weight": (vocab, width), "lm_head.weight": (vocab, width)}
    shapes |= {"model.norm.weight": (width,)}
    with SafetensorsWriter(folder / "model.safetensors", [Entry(n, torch.float32, s) for n, s in shapes.items()]) as w:
        for name, shape in shapes.items():
            w.write(name, torch.randn(shape) * 0.02)
    return [name.removesuffix(".weight") for name in shapes if ".layers." in name], shapes

def adapter(folder, width, r=8):
    folder.mkdir()
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 16, "bias": "none", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    with SafetensorsWriter(folder / "adapter_model.safetensors", [Entry(key + "A.weight", torch.float32, (r, width)),
            Entry(key + "B.weight", torch.float32, (width, r))]) as w:
        w.write(key + "A.weight", torch.randn(r, width)); w.write(key + "B.weight", torch.randn(width, r))

def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

root = Path(sys.argv[1])
for name, sizes in {"small": (64, 128, 256), "large": (1024, 2816, 20000)}.items():
    modules, shapes = base(root / name, *sizes)
    adapter(root / f"adapter-{name}", sizes[0])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
    before = rss()
    how = How(storage(), torch.bfloat16, "dequantized", torch.bfloat16, modules)
    merge_adapter(root / name, root / f"adapter-{name}", root / f"out-{name}", how)
peak = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")][0]
print(json.dumps({"growth": int(peak.split()[1]) * 1024 - before, "largest": 4 * 20000 * 1024,
    "checkpoint": (root / "large" / "model.safetensors").stat().st_size}))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux' resettable peak of memory")
def test_memory_holds_one_tensor_and_not_the_checkpoint(tmp_path):
    """Peak resident growth, mapped file included, against the largest tensor in float32."""
    here = os.path.dirname(__file__)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([here, os.getcwd()])}
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, env=environment, check=False
    )
    assert ran.returncode == 0, ran.stderr
    measured = json.loads(ran.stdout.splitlines()[-1])
    assert measured["checkpoint"] > 2e8
    assert measured["growth"] < 2.5 * measured["largest"] + 16e6, measured
