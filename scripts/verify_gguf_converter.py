"""What llama.cpp's own converter writes otherwise for the models of verify_gguf.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

CONVERT = """
import sys
source, folder, out, kind, pre = sys.argv[1:]
sys.path[:0] = [source, source + "/gguf-py"]
from conversion import base
def absent(self): raise FileNotFoundError
base.TextModel._create_vocab_sentencepiece = absent  # without a tokenizer.model, and without its package
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre  # it knows the hashes of published tokenizers alone
import convert_hf_to_gguf as convert
sys.argv = ["convert", folder, "--outfile", out, "--outtype", kind]
convert.main()
"""
OPEN = {"general.name", "general.size_label", "general.basename", "general.finetune", "general.license"}
"""Keys that describe a file to people."""


def check_converter(name: str, folder: Path, work: Path, converter: Path) -> list[str]:
    """What llama.cpp's own converter writes otherwise for a folder, tensor by tensor and key by key, as lines."""
    import gguf

    lines = []
    for kind in ("f32", "q8_0"):
        ours = gguf.GGUFReader(work / f"{name}-{kind}.gguf")
        pre = ours.fields["tokenizer.ggml.pre"].contents()
        out = work / f"{name}-{kind}-theirs.gguf"
        command = [sys.executable, "-c", CONVERT, str(converter), str(folder), str(out), kind, pre]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return [f"{name}: the converter stopped: {done.stderr.strip().splitlines()[-1]}"]
        theirs = gguf.GGUFReader(out)
        mine = {tensor.name: tensor for tensor in ours.tensors}
        yours = {tensor.name: tensor for tensor in theirs.tensors}
        lines += [f"{name} {kind}: only one has {tensor}" for tensor in sorted(set(mine) ^ set(yours))]
        for tensor in sorted(set(mine) & set(yours)):
            a, b = mine[tensor], yours[tensor]
            shapes = [f"{t.tensor_type.name} {t.shape.tolist()}" for t in (a, b)]
            if shapes[0] != shapes[1]:
                lines.append(f"{name} {kind}: {tensor} is {shapes[0]}, llama.cpp's {shapes[1]}")
            elif not np.array_equal(a.data, b.data):
                lines.append(f"{name} {kind}: {tensor} has other values")
        if kind == "f32":
            lines += _keys_apart(name, ours, theirs)
    return lines


def _keys_apart(name: str, ours: Any, theirs: Any) -> list[str]:
    lines = []
    for key in sorted(set(ours.fields) | set(theirs.fields)):
        if key.startswith("GGUF.") or key in OPEN:
            continue
        a, b = (reader.fields[key].contents() if key in reader.fields else None for reader in (ours, theirs))
        if a != b and not (isinstance(a, float) and isinstance(b, float) and np.isclose(a, b)):
            shown = [repr(value)[:60] if value is not None else "no key" for value in (a, b)]
            lines.append(f"{name} {key}: ours {shown[0]}, llama.cpp's {shown[1]}")
    return lines
