"""GGUF for llama.cpp, Ollama and LM Studio: a model folder or a LoRA adapter as one file, read back and compared."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_cli.errors import Exit, UserError
from qlora_cli.export.gguf_architectures import (
    Fields,
    architecture_of,
    check_config,
    fields_of,
    load_config,
    notes_of,
)
from qlora_cli.export.gguf_file import (
    Plan,
    aside,
    need_gguf,
    new_file,
    read_back,
    refuse_existing,
    unusual,
    write_file,
)
from qlora_cli.export.gguf_lora import LORA_TYPES, lora_fields, plan_lora, read_lora
from qlora_cli.export.gguf_tensors import plan_tensors
from qlora_cli.export.gguf_tokenizer import Trained, vocabulary_of
from qlora_cli.model.safetensors_stream import read_checkpoint

Say = Callable[[str], None]
TOOL = "llama-quantize"


@dataclass(frozen=True)
class FileType:
    """One type of file. code: llama.cpp's number for general.file_type; bits: of a weight of a large matrix.

    by_tool: only llama.cpp's own llama-quantize can write it.
    """

    code: int
    bits: float
    by_tool: bool = False


FILE_TYPES: dict[str, FileType] = {
    "f32": FileType(0, 32),
    "f16": FileType(1, 16),
    "bf16": FileType(32, 16),
    "q8_0": FileType(7, 8.5),
    "q4_0": FileType(2, 4.5),
    "q2_k": FileType(10, 3.35, by_tool=True),
    "q3_k_s": FileType(11, 3.5, by_tool=True),
    "q3_k_m": FileType(12, 3.9, by_tool=True),
    "q3_k_l": FileType(13, 4.3, by_tool=True),
    "q4_k_s": FileType(14, 4.6, by_tool=True),
    "q4_k_m": FileType(15, 4.9, by_tool=True),
    "q5_k_s": FileType(16, 5.5, by_tool=True),
    "q5_k_m": FileType(17, 5.7, by_tool=True),
    "q6_k": FileType(18, 6.6, by_tool=True),
}
"""By the name on the command line; `code` is LlamaFileType of llama.cpp's include/llama.h."""

STORED = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
"""The file from which llama-quantize works: as the model is stored."""


def check_gguf(folder: Path, file_type: str, trained: Trained | None = None) -> None:
    """Raises UserError for all that can be refused without reading weights.

    The type, a missing package or tool, the architecture and its settings, tensors without a place, the tokenizer.
    """
    _check_type(file_type)
    need_gguf()
    _plan(folder, file_type, trained)


def write_gguf(folder: Path, out: Path, file_type: str, say: Say, trained: Trained | None = None) -> dict[str, Any]:
    """Write a transformers folder as a new file `out`; memory holds one tensor and a slice of it in float32.

    say: gets one line for each thing that llama.cpp does otherwise in rare cases.
    Returns the type, the number of tensors and bytes, the seconds, and the largest relative L2 error of a tensor by
    its stored type, measured on the file. Raises UserError as `check_gguf`, and with exit code FAILED for a full disk;
    then nothing is left.
    """
    started = time.perf_counter()
    _check_type(file_type)
    need_gguf()
    refuse_existing(out)
    by_tool = FILE_TYPES[file_type].by_tool
    plan = _plan(folder, _stored(folder) if by_tool else file_type, trained)
    for note in plan.notes:
        say(note)
    errors = _by_tool(plan, out, file_type, say) if by_tool else _written(plan, out, say)
    return _facts(out, file_type, plan, errors) | {"seconds": time.perf_counter() - started}


def check_lora_gguf(adapter: Path, base: Path) -> None:
    """Raises UserError for an adapter that a GGUF file cannot express, or that does not fit the base's config.json."""
    need_gguf()
    plan_lora(read_lora(adapter), base)


def write_lora_gguf(adapter: Path, base: Path, out: Path, file_type: str, say: Say) -> dict[str, Any]:
    """Write a PEFT folder as a new file `out` for `llama-cli --lora`; base: a folder with the base's config.json.

    Returns the same facts as `write_gguf`. Raises UserError as `check_lora_gguf`, and for a type other than 16 or 32
    bits.
    """
    started = time.perf_counter()
    if file_type not in LORA_TYPES:
        raise UserError("--type", f"an adapter is not stored as {file_type!r}", f"use {', '.join(LORA_TYPES)}")
    need_gguf()
    refuse_existing(out)
    lora = read_lora(adapter)
    arch, tensors = plan_lora(lora, base, file_type)
    if any(pair.factor != 1.0 for pair in lora.pairs):
        say("the scaling of rsLoRA or a pattern is folded into B")
    plan = Plan(arch.name, lora_fields(lora) | _general(adapter, file_type), tensors, [])
    errors = _written(plan, out, say)
    return _facts(out, file_type, plan, errors) | {"seconds": time.perf_counter() - started}


def _check_type(file_type: str) -> None:
    if file_type not in FILE_TYPES:
        raise UserError("--type", f"unknown type {file_type!r}", f"use one of {', '.join(FILE_TYPES)}")
    if FILE_TYPES[file_type].by_tool and shutil.which(TOOL) is None:
        what = f"only llama.cpp's {TOOL} writes {file_type}, and it is not on PATH"
        own = ", ".join(name for name, kind in FILE_TYPES.items() if not kind.by_tool)
        raise UserError("--type", what, f"install llama.cpp, or use {own}", Exit.ENVIRONMENT)


def _plan(folder: Path, file_type: str, trained: Trained | None) -> Plan:
    """The file, without reading a weight. A type that the tool writes is planned as F32."""
    arch = architecture_of(folder)
    config = load_config(folder)
    check_config(folder, arch, config)
    own = "f32" if FILE_TYPES[file_type].by_tool else file_type
    tensors = plan_tensors(read_checkpoint(folder), arch, config, own)
    vocabulary = vocabulary_of(folder, config.vocab_size, trained)
    fields = {"general.type": "model"} | _general(folder, file_type)
    fields |= fields_of(folder, arch, config) | vocabulary.fields
    return Plan(arch.name, fields, tensors, notes_of(arch, config) + vocabulary.notes)


def _stored(folder: Path) -> str:
    """The type of file that a model as it is stored makes: of its matrices' dtype."""
    dtypes = [entry.dtype for entry in read_checkpoint(folder).entries().values() if len(entry.shape) > 1]
    return next((STORED[dtype] for dtype in STORED if dtype in dtypes), "f32")


def _written(plan: Plan, out: Path, say: Say) -> dict[str, float]:
    """Writes a file and reads it back; returns the rounding errors."""
    with new_file(out, plan.num_bytes, say) as partial:
        write_file(plan, partial, out)
        errors = read_back(plan, partial, out)
    for note in unusual(errors):
        say(note)
    return errors


def _general(folder: Path, file_type: str) -> Fields:
    """Keys of any file. A merged folder is called after its run."""
    from gguf import GGML_QUANT_VERSION

    whole = folder.absolute()
    name = whole.parent.name if whole.name in ("merged", "adapter") else whole.name
    return {
        "general.name": name,
        "general.file_type": FILE_TYPES[file_type].code,
        "general.quantization_version": int(GGML_QUANT_VERSION),
    }


def _facts(out: Path, file_type: str, plan: Plan, errors: dict[str, float]) -> dict[str, Any]:
    return {"type": file_type, "tensors": len(plan.tensors), "bytes": out.stat().st_size, "error": errors}


def _by_tool(plan: Plan, out: Path, file_type: str, say: Say) -> dict[str, float]:
    """A K-quant: our file in the stored dtype beside `out`, which llama-quantize reads; then the tensors are compared.

    Both lie aside under the one lock.
    """
    plain = aside(out, "plain")
    with new_file(out, plan.num_bytes * 16 // 10, say) as partial:
        try:
            write_file(plan, plain, out)
            read_back(plan, plain, out)
            _run_tool(plain, partial, file_type)
            return {file_type.upper(): _tool_error(plain, partial, out)}
        finally:
            plain.unlink(missing_ok=True)


def _run_tool(source: Path, target: Path, file_type: str) -> None:
    command = [str(shutil.which(TOOL)), str(source), str(target), file_type.upper()]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not target.is_file():
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it said nothing"]
        raise UserError(TOOL, f"stopped with exit code {done.returncode}: {last[0]}", "see its message", Exit.FAILED)


def _tool_error(source: Path, made: Path, out: Path) -> float:
    """The largest relative L2 error of a tensor that llama-quantize wrote. Raises UserError where it is no quantising.

    2-bit types reach 0.4 on Gaussian weights; unrelated tensors are 1.4 apart.
    """
    import numpy as np
    from gguf import GGUFReader, quants

    before = {tensor.name: tensor for tensor in GGUFReader(source).tensors}
    after = {tensor.name: tensor for tensor in GGUFReader(made).tensors}
    worst = 0.0
    for name in before.keys() & after.keys():
        exact, stored = (quants.dequantize(one.data, one.tensor_type) for one in (before[name], after[name]))
        worst = max(worst, float(np.linalg.norm(stored - exact) / max(float(np.linalg.norm(exact)), 1e-30)))
    if before.keys() != after.keys() or not worst < 0.6:
        what = f"{TOOL} wrote {len(after)} tensors of {len(before)}, the worst {worst:.2g} of its norm away"
        raise UserError(out, what, "report this with llama.cpp's version", Exit.FAILED)
    return worst
