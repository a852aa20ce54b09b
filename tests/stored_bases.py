"""Tiny Llamas stored by GPTQ and AWQ, packed in plain torch as the formats are described, and an adapter on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_cli.model.adapter import attach_adapter
from qlora_cli.model.base import Base, load_base
from qlora_cli.model.prequantized import METHODS
from tests.tiny import write_tiny_model

TOKENS = torch.arange(3, 51).reshape(2, 24)
GPTQ = {"bits": 4, "group_size": 32, "sym": False, "desc_act": True}
AWQ = {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def package_is_there() -> bool:
    """Whether GPTQ and AWQ checkpoints can be loaded here."""
    try:
        return all(metadata.version(package) for package, _least in METHODS["gptq"].needs)
    except metadata.PackageNotFoundError:
        return False


needs_package = pytest.mark.skipif(not package_is_there(), reason="gptqmodel and optimum are not there (qlora[gptq])")


def packed(codes: Tensor, bits: int) -> Tensor:
    """codes (rows, columns) below 2**bits to (rows · bits / 32, columns) int32, the first row in the lowest bits."""
    words = codes.to(torch.int64).reshape(-1, 32 // bits, codes.shape[1])
    return (words << (torch.arange(32 // bits) * bits)[:, None]).sum(1).to(torch.uint32).view(torch.int32)


def gptq(weight: Tensor, stored: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """A weight (out, in) as a GPTQ v1 checkpoint stores it, and the values that it stands for, in float16 steps."""
    (outputs, inputs), top = weight.shape, 2 ** stored["bits"] - 1
    group = torch.arange(inputs) // (stored["group_size"] if stored["group_size"] > 0 else inputs)
    if stored["desc_act"]:
        group = group[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
    scales, zeros = (torch.empty(int(group.max()) + 1, outputs, dtype=t) for t in (torch.float16, torch.int64))
    for index in range(len(scales)):
        part = weight[:, group == index]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if stored["sym"]:
            low, high = -part.abs().amax(1), part.abs().amax(1)
        scales[index] = (high - low) / top
        zeros[index] = (top + 1) // 2 if stored["sym"] else (-low / scales[index]).round().clamp(1, top)
    codes = (weight.T / scales.float()[group] + zeros[group]).round().clamp(0, top)
    tensors = {
        "qweight": packed(codes, stored["bits"]),
        "qzeros": packed(zeros.T - 1, stored["bits"]).T.contiguous(),  # version 1 stores one less
        "scales": scales,
        "g_idx": group.to(torch.int32),
    }
    return tensors, (scales[group] * (codes - zeros[group]).half()).T.float()


def awq(weight: Tensor, stored: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """A weight (out, in) as an AWQ `gemm` checkpoint stores it: packed along the outputs, in an order of its own."""
    groups = weight.T.reshape(-1, stored["group_size"], len(weight))
    low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales).round().clamp(0, 15)
    codes = (groups / scales.float() + zeros).round().clamp(0, 15)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def words(values: Tensor) -> Tensor:
        return packed(values.reshape(len(values), -1, 8)[:, :, order].flatten(1).T, 4).T.contiguous()

    tensors = {"qweight": words(codes.flatten(0, 1)), "qzeros": words(zeros[:, 0]), "scales": scales[:, 0]}
    return tensors, ((codes - zeros).half() * scales).flatten(0, 1).T.float()


PACKERS: dict[str, Callable[[Tensor, dict[str, Any]], tuple[dict[str, Tensor], Tensor]]] = {"gptq": gptq, "awq": awq}


def write_stored(folder: Path, method: str, stored: dict[str, Any], **config: Any) -> tuple[Path, Path]:
    """A tiny Llama with hand-packed linear weights, and one with the weights that these stand for."""
    quantized, reference = (write_tiny_model(folder / name, **config) for name in (method, "reference"))
    into, values = {}, {}
    for name, tensor in load_file(reference / "model.safetensors").items():
        if name.endswith("bias"):
            tensor = torch.linspace(-1, 1, len(tensor)).half().float()
        into[name] = values[name] = tensor
        if name.endswith("proj.weight"):
            tensors, values[name] = PACKERS[method](tensor, stored)
            del into[name]
            into |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in values.items()}, reference / "model.safetensors")
    save_file(into, quantized / "model.safetensors", {"format": "pt"})
    say_stored(quantized, {"quant_method": method, **stored})
    return quantized, reference


def store_by_bitsandbytes(
    plain: Path,
    folder: Path,
    data_type: str = "nf4",
    double_quant: bool = True,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
) -> Path:
    """The model of a folder as transformers saves it in bitsandbytes' 4 bits, its tokenizer beside it."""
    import transformers

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=data_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    kind = getattr(transformers, json.loads((plain / "config.json").read_text())["architectures"][0])
    model = kind.from_pretrained(plain, quantization_config=config, dtype=dtype, device_map={"": "cpu"})
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    transformers.AutoTokenizer.from_pretrained(plain).save_pretrained(folder)
    return folder


def say_stored(folder: Path, how: Any) -> None:
    """Writes a quantization_config into config.json."""
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": how}
    (folder / "config.json").write_text(json.dumps(config))


def loaded(make_recipe: Callable[..., Any], folder: Path, **quantization: str) -> Base:
    """The base in `folder` on the CPU, in float32 where the test does not say another type."""
    return load_base(make_recipe(model={"name_or_path": str(folder)}, quantization=quantization), torch.device("cpu"))


def trained(make_recipe: Callable[..., Any], base: Base) -> tuple[Any, dict[str, Tensor]]:
    """The base with a random adapter, and the adapter's gradients after an evaluation."""
    model = attach_adapter(base, make_recipe().adapter)
    generator = torch.Generator().manual_seed(0)
    adapted = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    for name in sorted(adapted):
        adapted[name].data = torch.randn(adapted[name].shape, generator=generator) * 0.1
    with torch.no_grad():
        model.eval()(TOKENS)  # first: kernels are known to change their weights in it
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    return model, {name: weight.grad for name, weight in adapted.items()}


def distance(found: Tensor, wanted: Tensor) -> float:
    """‖found - wanted‖ / ‖wanted‖."""
    return float((found - wanted).norm() / wanted.norm())
