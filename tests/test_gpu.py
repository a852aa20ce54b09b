"""What holds on the CPU holds on a GPU. Run by scripts/gpu_check.sh on any CUDA machine; skipped elsewhere."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_cli import commands, merging
from qlora_cli.display import QuietReport
from qlora_cli.model.adapter import attach_adapter
from qlora_cli.model.base import fingerprint, load_base
from qlora_cli.model.placement import resident
from qlora_cli.plan.rehearsal import Shape, examples_of, rehearse
from qlora_cli.quant import blockwise, kernels
from qlora_cli.quant.blockwise import Code, Packed, quantize
from qlora_cli.quant.codebooks import CODE_BOOKS
from qlora_cli.quant.data_types import CODES, UNIFORM
from qlora_cli.quant.layers import quantized_modules
from qlora_cli.quant.roundtrip import module_digest, quantized, quantized_digest
from qlora_cli.quant.scales import Scales
from qlora_cli.tasks.table import collated
from qlora_cli.train.recompute import Need, begin
from qlora_cli.train.step import accumulate
from tests.architectures import model_section, outputs, rows_of
from tests.tiny import write_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PACKED = {
    **{name: code(False, "auto") for name, code in CODES.items()},
    **{f"{name} with zero point": CODES[name](True, "absmax") for name in UNIFORM},
    "nf8": Code(8, CODE_BOOKS["nf8"]),
}


def train(recipe: Any, **how: Any) -> Path:
    settings = {"main_process": True, "resume": "auto", "pause_at": None} | how
    return commands.train(recipe, b"", QuietReport(), **settings)


@pytest.mark.parametrize("data_type", ["nf4", "fp4", "int8"])
def test_a_weight_is_quantised_to_the_same_bytes_on_both_devices(data_type):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 512, generator=generator, dtype=torch.float32).to(torch.bfloat16)
    on_cpu = quantized(weight, data_type, True, 64, torch.bfloat16)
    on_gpu = quantized(weight.to(GPU), data_type, True, 64, torch.bfloat16)
    assert torch.equal(on_cpu.data.view(torch.uint8).flatten(), on_gpu.data.cpu().view(torch.uint8).flatten())


@pytest.mark.parametrize("name", ["roberta", "t5", "llama"])
def test_a_new_head_is_the_same_on_both_devices(make_recipe, architecture, name):
    recipe = make_recipe(model=model_section(architecture(name), "sequence_classification"))
    on_cpu, on_gpu = (load_base(recipe, device) for device in (CPU, GPU))
    batch = rows_of("sequence_classification")
    heads = [dict(base.model.named_parameters()) for base in (on_cpu, on_gpu)]
    assert all(torch.equal(heads[0][tensor], heads[1][tensor].cpu()) for tensor in on_cpu.head.new)
    found = outputs(on_gpu.model, {key: tensor.to(GPU) for key, tensor in batch.items()})
    assert torch.allclose(found.cpu(), outputs(on_cpu.model, batch), atol=1e-3)


@pytest.mark.parametrize("block_size", [16, 20, 64, 96, 4096])
@pytest.mark.parametrize("name", PACKED)
def test_packed_weights_are_dequantised_to_the_bits_of_the_cpu(name, block_size):
    """Sizes as in test_triton_kernels.py; scales from the smallest of fp32, whose values are not flushed to zero."""
    code, number = PACKED[name], (4096 // block_size + 4) | 1
    weight = torch.randn((number, block_size), generator=torch.Generator().manual_seed(0))
    for smallest in (-40, -3):
        sized = weight * torch.logspace(smallest, 1, number).unsqueeze(1)
        for double_quant in (False, True):
            packed = quantize(sized, code, block_size, double_quant)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                on_gpu = kernels.dequantize(on(GPU, packed), code, block_size, weight.shape, dtype).cpu()
                on_cpu = blockwise.dequantize(packed, code, weight.shape, dtype)
                assert torch.equal(on_gpu.view(torch.uint8), on_cpu.view(torch.uint8)), (smallest, double_quant, dtype)


def on(device: torch.device, packed: Packed) -> Packed:
    """The same weight on another device."""
    scales = (packed.scales.values, packed.scales.absmax, packed.scales.offset)
    values, absmax, offset, zeros = (None if one is None else one.to(device) for one in (*scales, packed.zeros))
    return Packed(packed.codes.to(device), Scales(values, absmax, offset), zeros)


@pytest.mark.parametrize("name", ["int4", "int2"])
def test_a_packed_weight_of_more_than_2_to_the_31_values_is_dequantised_to_its_end(name):
    code, number = PACKED[name], 2**31 + 2**20
    if not kernels.HAS_TRITON or torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs Triton and 8 GiB of GPU memory")
    random = torch.Generator(GPU).manual_seed(0)
    codes = torch.randint(0, 256, (number * code.bits // 8,), generator=random, dtype=torch.uint8, device=GPU)
    scales = torch.rand(number // 64, generator=random, device=GPU)
    found = kernels.dequantize(Packed(codes, Scales(scales)), code, 64, torch.Size((number,)), torch.bfloat16)
    half = number // 2  # whose end and the tensor's end are in the last bytes of 2-bit codes
    ends = [number] if code.bits > 2 else [half, number]
    tail = torch.cat([scales[end // 64 - 64 : end // 64] for end in ends])
    last = Packed(codes[-64 * 64 * len(ends) * code.bits // 8 :], Scales(tail))
    wanted = blockwise.dequantize(last, code, torch.Size((64 * 64 * len(ends),)), torch.bfloat16)
    assert torch.equal(torch.cat([found[end - 64 * 64 : end] for end in ends]), wanted)


@pytest.mark.parametrize("data_type", ["nf4", "none"])
def test_logits_of_both_devices_agree(make_recipe, data_type):
    recipe = make_recipe(quantization={"data_type": data_type})
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        on_cpu = load_base(recipe, CPU).model(ids).logits
        on_gpu = load_base(recipe, GPU).model(ids.to(GPU)).logits.cpu()
    assert (on_cpu - on_gpu).norm() / on_cpu.norm() < 1e-4


def test_a_merge_recomputes_the_very_bytes_that_were_trained_on(make_recipe, tiny_model):
    base = load_base(make_recipe(), GPU)
    weights = load_file(tiny_model / "model.safetensors")
    for name, module in quantized_modules(base.model).items():
        again = quantized(weights[f"{name}.weight"].to(GPU), "nf4", True, 64, torch.float32)
        assert quantized_digest(again) == module_digest(module)


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw"])
def test_a_paused_run_equals_an_uninterrupted_one(make_recipe, tmp_path, optimizer):
    def recipe(name: str) -> Any:
        return make_recipe(
            adapter={"r": 64, "alpha": 64, "dropout": 0.05},
            quantization={"compute_dtype": "bfloat16"},
            training={"optimizer": optimizer, "deterministic": True, "save_steps": 2},
            output_dir=str(tmp_path / name),
        )

    whole = train(recipe("whole"))
    train(recipe("paused"), pause_at=3)
    paused = train(recipe("paused"))
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, paused))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_checkpointed_and_plain_backward_give_the_same_adapter(make_recipe, tmp_path):
    """Recomputation in backward must meet the same dequantised weights (bitsandbytes saves none through autograd)."""
    adapters = []
    for checkpointing in (True, False):
        training = {"gradient_checkpointing": checkpointing, "deterministic": True}
        folder = train(make_recipe(training=training, output_dir=str(tmp_path / str(checkpointing))))
        adapters.append(load_file(folder / "adapter_model.safetensors"))
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name])


def test_train_eval_and_merge_on_the_gpu(make_recipe, heldout_file, rows_file, tmp_path):
    recipe = make_recipe(
        data={"train": [{"path": str(rows_file)}], "eval": [{"path": str(heldout_file)}]},
        training={"optimizer": "paged_adamw_8bit"},
        evaluation={"max_new_tokens": 8},
    )
    adapter = train(recipe)
    result = commands.evaluate(recipe, QuietReport(), commands.Wanted(baseline=True, again=True))
    assert result["models"]["adapter"]["loss"] < result["models"]["base"]["loss"]
    wanted = merging.Wanted(tmp_path / "merged", dtype="float32")
    merged = merging.merge(adapter.parent, recipe, QuietReport(), wanted)["merges"][0]
    assert merged["certificate"]["max_abs"] < 1e-3
    assert merged["certificate"]["top1_agreement"] == 1.0


@pytest.mark.parametrize("data_type", ["nf4", "int4", "none"])
@pytest.mark.parametrize("memory", ["offload", "lean", "fast"])
def test_memory_changes_where_things_lie_and_no_bit_of_what_is_learned(make_recipe, tmp_path, memory, data_type):
    folder = write_tiny_model(tmp_path / "model", num_hidden_layers=5)
    adapters = []
    for value in ("auto", memory):
        recipe = make_recipe(
            model={"name_or_path": str(folder)},
            quantization={"data_type": data_type, "compute_dtype": "bfloat16"},
            adapter={"dropout": 0.1},
            training={"memory": value, "max_steps": 3, "gradient_checkpointing": True, "deterministic": True},
            output_dir=str(tmp_path / value),
        )
        adapters.append(load_file(train(recipe) / "adapter_model.safetensors"))
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_everything_but_the_embedding_and_the_layers_is_on_the_gpu(make_recipe):
    recipe = make_recipe(quantization={"skip_modules": []}, training={"memory": "lean"})
    base = load_base(recipe, GPU)
    assert base.device == base.model.device == GPU
    table = base.model.get_input_embeddings()
    for module in base.model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            assert tensor.device == (CPU if module is table else GPU)
            state = getattr(tensor, "quant_state", None)
            assert state is None or {state.absmax.device, state.code.device, state.state2.absmax.device} == {GPU}
    assert fingerprint(base.model) == fingerprint(load_base(resident(recipe), GPU).model)


@pytest.mark.parametrize("memory", ["offload", "lean"])
def test_a_run_that_leaves_weights_in_host_memory_is_evaluated_and_merged(make_recipe, rows_file, tmp_path, memory):
    recipe = make_recipe(
        data={"train": [{"path": str(rows_file)}], "eval_fraction": 0.3},
        training={"memory": memory, "max_steps": 2},
        output_dir=str(tmp_path / "run"),
    )
    train(recipe)
    commands.evaluate(recipe, QuietReport(), commands.Wanted(baseline=True))
    merged = merging.merge(tmp_path / "run", recipe, QuietReport(), merging.Wanted(tmp_path / "merged"))
    assert merged["held"]
    assert merged["merges"][0]["same_base"]


@pytest.mark.parametrize("memory", ["offload", "lean"])
def test_less_of_a_gpu_is_taken_where_host_memory_is_used_and_as_much_as_planned(make_recipe, tmp_path, memory):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8}
    folder = write_tiny_model(tmp_path / "model", num_hidden_layers=8, **sizes)
    peaks = {}
    for value in ("auto", memory):
        recipe = make_recipe(
            model={"name_or_path": str(folder)},
            quantization={"compute_dtype": "bfloat16"},
            training={"memory": value, "gradient_checkpointing": True, "gradient_accumulation_steps": 1},
        )
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        base = load_base(recipe, GPU)
        model = attach_adapter(base, recipe.adapter).train()
        base.model.config.use_cache = False
        begin(recipe.training, Need(base, 1, 512, True), None, print)
        batch = collated(examples_of(Shape((512,)), base), True, base)
        for _ in range(2):
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            accumulate(base, model, [batch], 512)
        peaks[value] = torch.cuda.max_memory_allocated() - before
        planned = rehearse(recipe, base.config, Shape((512,), True), "cuda")
        assert abs(planned.num_bytes / peaks[value] - 1) < 0.1
        del base, model, batch
        gc.collect()
    assert peaks[memory] < peaks["auto"]
