"""A GGUF file written a slice of a tensor at a time, read back and compared before it gets its name."""

from __future__ import annotations

import fcntl
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qlora_cli.errors import Exit, UserError
from qlora_cli.export.gguf_architectures import Fields
from qlora_cli.model.safetensors_stream import disk
from qlora_cli.model.whole_folder import sync

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType as Type
    from gguf import GGUFReader, GGUFWriter

SLICE = 1 << 20
"""Elements of a tensor in float32 at once: 4 MiB."""

USUAL = {"F32": 0.0, "F16": 1e-3, "BF16": 4e-3, "Q8_0": 0.02, "Q4_0": 0.25}
"""The relative L2 error of a tensor by rounding, above which a note says so.

2^-11 and 2^-8 per element; F16 has more where weights are below its smallest normal number, 6e-5. Q8_0 and Q4_0 have
0.005 and 0.09 on Gaussian weights, more where a block holds an outlier.
"""


@dataclass(frozen=True)
class Planned:
    """A tensor to be written. load: its value, in any float dtype, of `shape`; called twice."""

    name: str
    shape: tuple[int, ...]
    type: Type
    load: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Of its data in the file."""
        from gguf import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size


@dataclass(frozen=True)
class Plan:
    """All of a file before a weight is read. notes: what llama.cpp does otherwise in rare cases."""

    arch: str
    fields: Fields
    tensors: list[Planned]
    notes: list[str]

    @property
    def num_bytes(self) -> int:
        """Of the tensors' data."""
        return sum(tensor.num_bytes for tensor in self.tensors)


def need_gguf() -> None:
    """Raises UserError where the package that writes the format is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError("gguf", "this package is missing", "run `pip install 'qlora[export]'`", Exit.ENVIRONMENT) from (
            error
        )


@contextmanager
def new_file(out: Path, num_bytes: int, say: Callable[[str], None]) -> Iterator[Path]:
    """A temporary sibling that becomes `out` when the block succeeds, and goes when it fails. Overwrites nothing.

    say: is told where it takes the place of what a killed export left. Raises UserError (exit code IN_USE) where
    another export is at work on this very file.
    """
    refuse_existing(out)
    partial = aside(out)
    with disk(out, num_bytes):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(partial, out)
    try:
        if os.fstat(lock).st_size or aside(out, "plain").exists():
            say(f"what an export that was killed had left of {out} is replaced")
            os.truncate(lock, 0)
            aside(out, "plain").unlink(missing_ok=True)
        free = shutil.disk_usage(partial.parent).free
        if free < num_bytes:
            what = f"{num_bytes:,} bytes are needed and {free:,} are free"
            raise UserError(out, what, "free space or name another place", Exit.FAILED)
        yield partial
        with disk(out, num_bytes):
            sync(partial)
            _give_name(partial, out)
            sync(partial.parent)
    finally:
        partial.unlink(missing_ok=True)
        os.close(lock)


def aside(out: Path, kind: str = "partial") -> Path:
    """Where a file is written before it gets its name."""
    return out.absolute().with_name(f".{out.name}.{kind}")


def _locked(partial: Path, out: Path) -> int:
    """The descriptor of the file aside, which is ours until it is closed. Raises UserError where it is another's."""
    while True:
        lock = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise UserError(out, "another export is writing it", "wait for it to end", Exit.IN_USE) from None
        if partial.exists() and os.path.samestat(os.fstat(lock), partial.stat()):
            return lock
        os.close(lock)  # the other one ended in between, and took the file away


def _give_name(partial: Path, out: Path) -> None:
    """Renames, where nothing has that name by now."""
    try:
        os.link(partial, out)
    except FileExistsError:
        refuse_existing(out)
    except OSError:  # a file system without hard links: an empty file of our own is what is replaced
        os.close(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        partial.replace(out)


def refuse_existing(out: Path) -> None:
    """Raises UserError where something is there already."""
    if os.path.lexists(out):
        raise UserError(out, "it exists; nothing is overwritten", "name a new file")


def write_file(plan: Plan, path: Path, out: Path) -> None:
    """Write header, keys and tensors to `path`, which people know as `out`.

    Raises UserError for a full disk or a weight that its type cannot hold.
    """
    from gguf import GGUFWriter
    from gguf.quants import quant_shape_to_byte_shape

    with disk(out, plan.num_bytes):
        writer = GGUFWriter(path, plan.arch)
        try:
            _add_fields(writer, plan.fields)
            for tensor in plan.tensors:
                shape = quant_shape_to_byte_shape(tensor.shape, tensor.type)
                writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), tensor.num_bytes, tensor.type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            assert writer.fout is not None
            file = writer.fout[0]
            for tensor in plan.tensors:
                writer.write_padding(file, file.tell())
                for values in _slices(tensor.load()):
                    file.write(encode(values, tensor.type, tensor.name).data)
            writer.write_padding(file, file.tell())
            file.flush()
        finally:
            for file in writer.fout or []:
                try:
                    file.close()
                except OSError:  # what a full disk left in the buffer is lost with the partial file
                    file.raw.close()


def encode(values: Tensor, kind: Type, name: str) -> np.ndarray:
    """Values as the bytes of a type. Raises UserError where they are not finite in it."""
    from gguf import GGMLQuantizationType, quants

    plain = {
        GGMLQuantizationType.F32: torch.float32,
        GGMLQuantizationType.F16: torch.float16,
        GGMLQuantizationType.BF16: torch.bfloat16,
    }
    result = values.to(plain.get(kind, torch.float16 if kind.name.startswith("Q") else torch.float32))
    if result.numel() and not all(math.isfinite(bound.item()) for bound in torch.aminmax(result)):
        what = f"{name} has weights that are not finite in {kind.name}"
        raise UserError("the model", what, "choose bf16 or f32; if that fails too, the model is broken", Exit.FAILED)
    if kind in plain:
        return result.contiguous().view(torch.uint8).numpy()
    return quants.quantize(values.float().contiguous().numpy(), kind)


def read_back(plan: Plan, path: Path, out: Path) -> dict[str, float]:
    """The largest relative L2 error of a tensor by its type, after comparing keys and every byte of every tensor.

    Raises UserError (exit code FAILED) where the file at `path` does not hold what was written.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    _compare_fields(out, reader, plan.fields)
    found = {tensor.name: tensor for tensor in reader.tensors}
    worst: dict[str, float] = {}
    if sorted(found) != sorted(tensor.name for tensor in plan.tensors):
        raise _differs(out, "other tensors than were written")
    for tensor in plan.tensors:
        stored = found[tensor.name]
        if stored.tensor_type != tensor.type or tuple(reversed(stored.shape.tolist())) != tensor.shape:
            raise _differs(out, f"{tensor.name} has another type or shape")
        name = tensor.type.name
        error = _rounding(stored.data, tensor, out)
        worst[name] = max(worst.get(name, 0.0), error)
    return worst


def unusual(errors: dict[str, float]) -> list[str]:
    """Notes on types whose rounding moves a tensor more than they ordinarily do."""
    return [
        f"{name} moves a tensor by {error:.1%} of its norm, ordinarily by at most {USUAL[name]:.1%}: another --type "
        "keeps more of it"
        for name, error in errors.items()
        if error > USUAL[name]
    ]


def _rounding(stored: np.ndarray, tensor: Planned, out: Path) -> float:
    """‖stored - value‖ / ‖value‖, slice by slice. Raises UserError where a byte is not what the encoder makes."""
    from gguf import quants

    apart = norm = 0.0
    rows = stored.reshape(-1, stored.shape[-1])
    start = 0
    for values in _slices(tensor.load()):
        part = np.ascontiguousarray(rows[start : start + len(values)])
        start += len(values)
        made = encode(values, tensor.type, tensor.name)
        if not np.array_equal(part.view(np.uint8).ravel(), made.view(np.uint8).ravel()):
            raise _differs(out, f"{tensor.name} has other bytes than were written")
        exact = values.double()
        dequantized = quants.dequantize(part, tensor.type).astype(np.float64)
        apart += (torch.from_numpy(dequantized).reshape(exact.shape) - exact).square().sum().item()
        norm += exact.square().sum().item()
    return math.sqrt(apart / norm) if norm else math.sqrt(apart)


def _slices(values: Tensor) -> Iterator[Tensor]:
    """A tensor as matrices of at most SLICE elements (more only where one row is larger)."""
    rows = values.reshape(-1, values.shape[-1]) if values.ndim != 1 else values.reshape(1, -1)
    step = max(1, SLICE // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _add_fields(writer: GGUFWriter, fields: Mapping[str, Any]) -> None:
    from gguf import GGUFValueType

    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    for key, value in fields.items():
        if isinstance(value, str):
            writer.add_key_value(key, value, GGUFValueType.STRING)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, kinds[type(value)])


def _compare_fields(path: Path, reader: GGUFReader, fields: Mapping[str, Any]) -> None:
    for key, value in fields.items():
        if isinstance(value, list) and not value:
            continue  # the library leaves out what is empty
        field = reader.fields.get(key)
        stored = None if field is None else field.contents()
        if stored is not None and isinstance(value[0] if isinstance(value, list) else value, float):
            same = np.array_equal(np.asarray(stored, np.float32), np.asarray(value, np.float32))
        else:
            same = stored == value
        if not same:
            raise _differs(path, f"key {key} is not as it was written")


def _differs(path: Path, what: str) -> UserError:
    return UserError(path, f"read back, {what}; the file is removed", "check the disk and export again", Exit.FAILED)
