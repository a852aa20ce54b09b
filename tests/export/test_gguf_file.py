"""A GGUF file on its way to its name: what is compared, who may write, what a killed export leaves."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.errors import Exit, UserError
from qlora_cli.export import gguf_file
from qlora_cli.export.gguf import write_gguf
from qlora_cli.export.gguf_file import Plan, Planned, aside, new_file, read_back, refuse_existing, unusual, write_file
from scripts.verify_gguf_weights import with_weights_of
from tests.conftest import REPOSITORY
from tests.export.gguf_models import CASES, make_model, write_model

gguf = pytest.importorskip("gguf")


def planned(kind: str, values: torch.Tensor) -> Plan:
    """A file of one tensor."""
    tensor = Planned("one.weight", tuple(values.shape), gguf.GGMLQuantizationType[kind], lambda: values)
    return Plan("llama", {"general.type": "model"}, [tensor], [])


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def quiet(note: str) -> None:
    """For `say`."""


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_one_changed_bit_of_a_tensor_is_found(kind: str, tmp_path: Path) -> None:
    plan, path = planned(kind, drawn(64, 64)), tmp_path / "made.gguf"
    write_file(plan, path, path)
    assert list(read_back(plan, path, path)) == [kind]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # a mantissa bit that moves the tensor by far less than rounding does
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"read back, one.weight has other bytes than were written") as error:
        read_back(plan, path, tmp_path / "called.gguf")
    assert (error.value.code, error.value.where) == (Exit.FAILED, str(tmp_path / "called.gguf"))


def test_weights_too_small_for_f16_are_written_and_told_and_refused_by_nobody(tmp_path: Path) -> None:
    plan, path = planned("F16", drawn(64, 64) * 2e-6), tmp_path / "made.gguf"
    write_file(plan, path, path)
    errors = read_back(plan, path, path)
    assert 5e-3 < errors["F16"] < 5e-2
    (note,) = unusual(errors)
    assert note.startswith("F16 moves a tensor by ")
    assert unusual({"F16": 3e-4, "F32": 0.0, "Q8_0": 6e-3}) == []


def test_two_exports_of_one_file_at_once_are_one_and_a_message(tmp_path: Path) -> None:
    out = tmp_path / "made.gguf"
    with new_file(out, 1, quiet) as partial:
        with pytest.raises(UserError, match="another export is writing it") as error, new_file(out, 1, quiet):
            pass
        partial.write_bytes(b"first")
    assert error.value.code == Exit.IN_USE
    assert out.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [out]


def write_while_another_does(out: Path) -> None:
    with new_file(out, 1, quiet) as partial:
        partial.write_bytes(b"mine")
        out.write_bytes(b"theirs")


def test_what_appears_in_the_meantime_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "made.gguf"

    def refuse(*_paths: Path) -> None:
        raise PermissionError(1, "no hard links")

    for can_link in (True, False):
        if not can_link:
            monkeypatch.setattr(gguf_file.os, "link", refuse)
        with pytest.raises(UserError, match=r"nothing is overwritten|File exists"):
            write_while_another_does(out)
        assert out.read_bytes() == b"theirs"
        assert list(tmp_path.iterdir()) == [out]
        out.unlink()
    with new_file(out, 1, quiet) as partial:
        partial.write_bytes(b"mine")
    assert out.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [out]


def test_a_killed_export_leaves_one_file_which_the_next_one_replaces_and_tells(tmp_path: Path) -> None:
    folder, out = write_model("llama-2", tmp_path / "model"), tmp_path / "made" / "model.gguf"
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom qlora_cli.export import gguf\n"
        "gguf.read_back = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "gguf.write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), 'f16', print)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder), str(out)], cwd=REPOSITORY, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in out.parent.iterdir()] == [".model.gguf.partial"]
    aside(out, "plain").write_bytes(b"of a K-quant")
    said: list[str] = []
    write_gguf(folder, out, "f16", said.append)
    assert f"what an export that was killed had left of {out} is replaced" in said
    assert list(out.parent.iterdir()) == [out]


def test_a_file_that_another_takes_away_while_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, lock, taken = tmp_path / "made.gguf", fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not taken:
            taken.append(aside(out).unlink())  # the other export ended between our open and our lock
        lock(descriptor, how)

    monkeypatch.setattr(gguf_file.fcntl, "flock", late)
    with new_file(out, 1, quiet) as partial:
        partial.write_bytes(b"whole")
    assert (taken, out.read_bytes()) == ([None], b"whole")


@pytest.mark.parametrize("place", ["file/model.gguf", f"{'x' * 300}.gguf", f"{'x' * 250}"])
def test_places_that_cannot_be_are_a_message(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write: "), new_file(tmp_path / place, 1, quiet):
        pass
    refuse_existing(tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_k_quant_keeps_its_intermediate_file_under_the_same_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = write_model("llama-2", tmp_path / "model"), tmp_path / "out" / "model.gguf"
    tool = tmp_path / "bin" / "llama-quantize"
    tool.parent.mkdir()
    copy = "import os, shutil, sys\nprint(sorted(os.listdir(os.path.dirname(sys.argv[1]))))\n"
    tool.write_text(f"#!{sys.executable}\n{copy}shutil.copy(*sys.argv[1:3])\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    seen: list[Any] = []

    def second(note: str) -> None:
        seen.append(note)

    with new_file(out, 1, second):
        with pytest.raises(UserError, match="another export is writing it"):
            write_gguf(folder, out, "q4_k_m", second)
        assert not aside(out, "plain").exists()
        aside(out).write_bytes(b"x")
    out.unlink()
    assert write_gguf(folder, out, "q4_k_m", second)["error"] == {"Q4_K_M": 0.0}  # this tool copies
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("name", CASES)
def test_the_way_back_from_a_file_gives_every_weight_of_the_model(name: str, tmp_path: Path) -> None:
    folder, out = write_model(name, tmp_path / "model"), tmp_path / "model.gguf"
    write_gguf(folder, out, "f32", quiet)
    model = make_model(name)
    blank = make_model(name)
    with torch.no_grad():
        for parameter in blank.parameters():
            parameter.zero_()
    found = dict(with_weights_of(out, folder, blank).named_parameters())
    for parameter, value in model.named_parameters():
        # of a Gemma norm 1 + w is stored
        assert torch.allclose(found[parameter], value, rtol=0, atol=3e-7 if "gemma" in name else 0), parameter
