"""safetensors read and written one tensor at a time, so that memory holds one tensor and never a checkpoint.

The format (github.com/huggingface/safetensors, README): 8 bytes little-endian header length, a JSON header with dtype,
shape and offsets per name, then the bytes without a gap.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora_cli.errors import Exit, UserError
from qlora_cli.model.whole_folder import sync

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes that we read and write, by their name in the format."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}

PIECE = 1 << 17
"""Bytes of a write: ext4 caches larger ones in pages of megabytes, which the kernel may have to look for. Measured:
3 GB/s in pieces of 128 kB, 0.4 from 512 kB on."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """A tensor that is not in memory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of its data on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


@contextmanager
def disk(path: Path, bytes_needed: int) -> Iterator[None]:
    """A full disk or an unwritable folder inside the block becomes a `UserError` that names the bytes needed."""
    try:
        yield
    except OSError as error:
        raise UserError(
            path,
            f"cannot write: {error.strerror}; {bytes_needed:,} bytes are needed",
            "free space there or name another folder",
            Exit.FAILED,
        ) from error


def read_entries(path: Path) -> list[Entry]:
    """The tensors of one safetensors file, from its header. Raises UserError for a missing or damaged file."""
    if not path.is_file():
        raise UserError(path, "this file is missing", "complete the folder, or download the model again")
    try:
        with safe_open(path, framework="pt") as file:
            slices = [(name, file.get_slice(name)) for name in file.offset_keys()]
            return [Entry(name, _dtype(path, name, s.get_dtype()), tuple(s.get_shape())) for name, s in slices]
    except (SafetensorError, OSError) as error:
        raise UserError(path, f"damaged safetensors file ({error})", "copy or download it again") from error


def _dtype(path: Path, name: str, in_file: str) -> torch.dtype:
    if in_file not in DTYPES:
        raise UserError(path, f"tensor {name} has dtype {in_file}, which is not available yet", "use a 16-bit model")
    return DTYPES[in_file]


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a file. The file is opened anew, so that its mapping goes when the tensor goes."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors: the tensors of every shard by the shard's file name."""

    folder: Path
    shards: dict[str, list[Entry]]

    def entries(self) -> dict[str, Entry]:
        """Every tensor by its name."""
        return {entry.name: entry for entries in self.shards.values() for entry in entries}


def read_checkpoint(folder: Path) -> Checkpoint:
    """The headers of `model.safetensors`, or of the shards that its index names.

    Raises UserError where a shard is missing or damaged, the index is wrong, or there are only pickles.
    """
    if (folder / SINGLE).is_file():
        return Checkpoint(folder, {SINGLE: read_entries(folder / SINGLE)})
    index = folder / INDEX
    if not index.is_file():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found = f"only the pickle {pickles[0]}, which is never read" if pickles else f"neither {SINGLE} nor {INDEX}"
        raise UserError(folder, f"found {found}", "use a model published as safetensors")
    weight_map = _weight_map(index)
    shards = {shard: read_entries(folder / shard) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if all(entry.name != name for entry in shards[shard]):
            raise UserError(index, f"tensor {name} is not in {shard}", "copy or download the model again")
    return Checkpoint(folder, shards)


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name to file name. Only plain file names pass: a merge writes files of the same names."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(index, "damaged index: no JSON with a weight_map", "copy or download it again") from error
    for shard in names.values():
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(index, f"shard {shard!r} is not the name of a safetensors file", "mend the index")
    return names


class SafetensorsWriter:
    """One file whose tensors are known before and come in any order, each once.

    A context: leaving it normally makes the file durable and gives it its name; an exception leaves nothing behind.
    Raises UserError (exit code FAILED) when the disk is full or the folder cannot be written.
    """

    def __init__(self, path: Path, entries: Sequence[Entry], metadata: dict[str, str] | None = None):
        self.path, self.partial = path, path.with_name(f".{path.name}.partial")
        # Wide dtypes first, as the library writes: readers view the mapped bytes, which have to be aligned.
        ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
        header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
        self.pending: dict[str, tuple[Entry, int, int]] = {}  # where its next byte goes, and how many are left
        offset = 0
        for entry in ordered:
            assert entry.name not in self.pending, f"{entry.name} twice"
            self.pending[entry.name] = (entry, offset, entry.num_bytes)
            end = offset + entry.num_bytes
            header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        self.header = text + b" " * (-len(text) % 8)
        self.num_bytes = 8 + len(self.header) + offset

    def __enter__(self) -> SafetensorsWriter:
        with disk(self.path, self.num_bytes):
            self.file = self.partial.open("wb")
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor of the dtype and shape announced, or the next rows of it, from any device."""
        entry, offset, left = self.pending[name]
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        fits = tensor.dtype == entry.dtype and tuple(tensor.shape[1:]) == entry.shape[1:] and len(content) <= left
        assert fits, f"{name}: not as announced"
        with disk(self.path, self.num_bytes):
            self.file.seek(8 + len(self.header) + offset)
            for begin in range(0, len(content), PIECE):
                self.file.write(content[begin : begin + PIECE])
        self.pending[name] = (entry, offset + len(content), left - len(content))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                short = sorted(name for name, (_, _, left) in self.pending.items() if left)
                assert not short, f"never written: {short}"
                with disk(self.path, self.num_bytes):
                    self.file.seek(0)
                    self.file.write(struct.pack("<Q", len(self.header)) + self.header)
                    self.file.flush()
                    os.fsync(self.file.fileno())
                    self.partial.replace(self.path)
                    sync(self.path.parent)
        finally:
            with suppress(OSError):  # what a full disk left in the buffer is lost with the partial file
                self.file.close()
            self.partial.unlink(missing_ok=True)
