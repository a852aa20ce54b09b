"""Weights that GPTQ and AWQ checkpoints hold, in plain torch: the very values of the live layers.

Codes lie in int32 words one behind the other, the first in the lowest bits, so that one of 3 bits may reach into the
next word. Read in gptqmodel 7.6.0: `nn_modules/qlinear/__init__.py` (dequantize_weight), `utils/model.py`
(convert_gptq_v1_to_v2_format_module), `quantization/awq/utils/packing_utils.py` (dequantize_gemm).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from qlora_cli.errors import UserError
from qlora_cli.model.source import read_config
from qlora_cli.model.stored_weight import StoredWeight, Tensors, stored_transposed

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""Data types of scales and biases in a file; the live layers hold both in float16."""

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where eight outputs have their 4-bit codes in a word of an AWQ checkpoint."""

Values = Callable[[dict[str, Tensor]], Tensor]
"""The parts of a layer by their short names to its weight (in_features, out_features) in float16."""


def gptq_weights(stored: Tensors) -> list[StoredWeight]:
    """The tensors of a GPTQ checkpoint that its layers hold in another way, checked by its headers."""
    config = read_config(stored.folder)["quantization_config"]
    kind = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    _refuse_other(stored, kind, ("gptq", "gptq_v2"))
    bits: int = config["bits"]
    values = partial(gptq_values, bits=bits, version=2 if kind == "gptq_v2" else 1)
    found = []
    for module in _modules(stored):
        inputs = stored.entry(f"{module}.g_idx", f"{module}.qweight").shape[0]
        outputs = stored.entry(f"{module}.scales", f"{module}.qweight").shape[-1]
        stored.require(f"{module}.g_idx", (inputs,), (torch.int32, torch.int64), f"{module}.qweight")
        _require_codes(stored, module, (num_words(inputs, bits), outputs), num_words(outputs, bits))
        found.append((module, (outputs, inputs), ("qweight", "qzeros", "scales", "g_idx")))
    return list(_as_live(stored, found, values))


def awq_weights(stored: Tensors) -> list[StoredWeight]:
    """The tensors of an AWQ checkpoint that its layers hold in another way, checked by its headers.

    Raises UserError too for one that scales the outputs of an activation, which no ordinary model does.
    """
    config = read_config(stored.folder)["quantization_config"]
    _refuse_other(stored, str(config.get("version") or config.get("format") or "gemm").lower(), ("gemm",))
    bits: int = config["bits"]
    modules = _modules(stored)
    for name in stored.entries:
        if name.endswith(".scales") and name.removesuffix(".scales") not in modules:
            what = f"{name} scales an activation, which an ordinary model does not"
            raise UserError(stored.file(name), what, "use the adapter unmerged")
    found = []
    for module in modules:
        inputs = stored.entries[f"{module}.qweight"].shape[0]
        outputs = stored.entry(f"{module}.scales", f"{module}.qweight").shape[-1]
        _require_codes(stored, module, (inputs, num_words(outputs, bits)), num_words(outputs, bits))
        found.append((module, (outputs, inputs), ("qweight", "qzeros", "scales")))
    return list(_as_live(stored, found, partial(awq_values, bits=bits)))


def gptq_values(parts: dict[str, Tensor], bits: int, version: int) -> Tensor:
    """scale · (code - zero) of an input's group: (in_features, out_features) float16.

    Version 1 stores zeros less one, and adds it back in whole words: what runs over reaches the next zero.
    """
    scales, groups, zeros = parts["scales"].half(), parts["g_idx"].long(), parts["qzeros"]
    if version == 1 and 32 % bits == 0:
        zeros = zeros + sum(1 << at for at in range(0, 32, bits))
    zeros = unpacked(zeros.T, bits).T[:, : scales.shape[1]]
    if version == 1 and 32 % bits:
        zeros = (zeros + 1) & (2**bits - 1)
    codes = unpacked(parts["qweight"], bits)[: len(groups)]
    return scales[groups] * codes.sub_(zeros[groups])


def awq_values(parts: dict[str, Tensor], bits: int) -> Tensor:
    """(code - zero) · scale of an input's group, which are whole and in order: (in_features, out_features) float16."""
    scales = parts["scales"].half()
    codes, zeros = (unpacked(parts[part].T, bits).T[:, : scales.shape[1]] for part in ("qweight", "qzeros"))
    if bits == 4:
        codes, zeros = (words.reshape(len(words), -1, 8)[:, :, AWQ_ORDER].flatten(1) for words in (codes, zeros))
    size = len(codes) // len(scales)
    return (codes - zeros.repeat_interleave(size, dim=0)) * scales.repeat_interleave(size, dim=0)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """words (n, columns) int32 to codes (n · 32 / bits, columns): int8, of 8 bits int16, since a zero is taken off."""
    per_period, in_period = bits // math.gcd(bits, 32), 32 // math.gcd(bits, 32)  # words, and codes, until they meet
    periods = words.reshape(-1, per_period, words.shape[1])
    codes = torch.empty(
        len(periods), in_period, words.shape[1], dtype=torch.int16 if bits == 8 else torch.int8, device=words.device
    )
    for at in range(in_period):
        word, shift = divmod(at * bits, 32)
        value = periods[:, word] >> shift
        if shift + bits > 32:  # the shift has filled its upper bits with the sign
            value = value & (1 << 32 - shift) - 1 | periods[:, word + 1] << 32 - shift
        codes[:, at] = value & (2**bits - 1)
    return codes.flatten(0, 1)


def num_words(count: int, bits: int) -> int:
    """int32 words that `count` codes take."""
    return math.ceil(count * bits / 32)


def _modules(stored: Tensors) -> list[str]:
    """The names of the layers."""
    return [name.removesuffix(".qweight") for name in stored.entries if name.endswith(".qweight")]


def _refuse_other(stored: Tensors, kind: str, known: tuple[str, ...]) -> None:
    if kind not in known:
        what = f"merging a base in the format {kind} is not available yet, only in {' and '.join(known)}"
        raise UserError(stored.folder / "config.json", what, "use the adapter unmerged")


def _require_codes(stored: Tensors, module: str, codes: tuple[int, int], zeros: int) -> None:
    """Refuses a layer whose codes, zeros and scales do not fit each other. zeros: words of a group's."""
    groups, outputs = stored.entries[f"{module}.scales"].shape[0], stored.entries[f"{module}.scales"].shape[-1]
    stored.require(f"{module}.qweight", codes, (torch.int32,), f"{module}.scales")
    stored.require(f"{module}.qzeros", (groups, zeros), (torch.int32,), f"{module}.qweight")
    stored.require(f"{module}.scales", (groups, outputs), FLOATS, f"{module}.qweight")


def _as_live(
    stored: Tensors, layers: Sequence[tuple[str, tuple[int, int], tuple[str, ...]]], values: Values
) -> Iterator[StoredWeight]:
    """Weights and biases of layers. layers: name, (out_features, in_features), parts."""
    transposed = stored_transposed(stored.folder)
    for module, shape, parts in layers:
        name, bias, turned = f"{module}.weight", f"{module}.bias", transposed(f"{module}.weight")
        read = partial(_weight, stored, {part: f"{module}.{part}" for part in parts}, values, turned)
        ordinary = shape[::-1] if turned else shape
        yield StoredWeight(name, ordinary, tuple(f"{module}.{part}" for part in parts), read)
        if bias in stored.entries:
            yield StoredWeight(bias, stored.entries[bias].shape, (bias,), partial(_bias, stored, bias))


def _weight(stored: Tensors, parts: dict[str, str], values: Values, transposed: bool, dtype: torch.dtype) -> Tensor:
    """A weight in the orientation of an ordinary checkpoint."""
    tensors = {part: stored.read(name) for part, name in parts.items()}
    if "g_idx" in tensors and int(tensors["g_idx"].max()) >= len(tensors["scales"]):
        what = f"{parts['g_idx']} names group {int(tensors['g_idx'].max())} of {len(tensors['scales'])}"
        raise UserError(stored.file(parts["g_idx"]), what, "restore the folder")
    found = values(tensors).to(dtype)
    return found if transposed else found.T


def _bias(stored: Tensors, name: str, dtype: torch.dtype) -> Tensor:
    return stored.read(name).half().to(dtype)
