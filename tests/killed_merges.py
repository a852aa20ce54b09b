"""`qlora merge` killed at each of its moments in turn: forks of one process that has imported everything once.

    python -m tests.killed_merges RUN FOLDER

prints a JSON list, an object for each moment: a call that changes the disk, after which the process is killed.
Another object is of a process that is stopped there, and a second one beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qlora_cli.cli import main as qlora

PLACE = "out"


def forked(folder: Path, arguments: list[str], arm: Callable[[], None] = lambda: None) -> int:
    """A process that runs the command line; its output goes to folder / "said". Returns its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code: Any = 99
    try:
        said = os.open(folder / "said", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.argv = ["qlora", *arguments]
        arm()
        try:
            qlora()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """The exit code of a process, or minus the signal that killed or stopped it."""
    status = os.waitpid(pid, os.WUNTRACED)[1]
    return -os.WSTOPSIG(status) if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)


def arm(folder: Path, at: int, by: signal.Signals) -> None:
    """Lets this process be killed after its at-th call that changes something below `folder`."""
    from qlora_cli.model.safetensors_stream import SafetensorsWriter

    count = 0

    def unwritten(writer: SafetensorsWriter) -> int:
        return sum(left > 0 for _entry, _offset, left in writer.pending.values())

    def counted(owner: Any, name: str, place: Callable[..., str]) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal count
            where = place(*arguments)
            result = real(*arguments, **more)
            if where.startswith(str(folder)):
                count += 1
                if count == at:
                    (folder / "moment").write_text(f"{name} {where.removeprefix(str(folder))}")
                    os.kill(os.getpid(), by)
            return result

        setattr(owner, name, call)

    counted(Path, "mkdir", lambda path, *_: str(path.absolute()))
    counted(Path, "unlink", lambda path, *_: "" if "safetensors" in path.name else str(path.absolute()))
    for name in ("replace", "rename"):
        counted(Path, name, lambda path, target: str(target))
    counted(os, "fsync", once(lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}")))
    last = 1  # of a file's tensors, so that there is a moment with a file half written
    counted(SafetensorsWriter, "write", lambda w, *_: str(w.path.absolute()) if unwritten(w) == last else "")


def once(place: Callable[..., str]) -> Callable[..., str]:
    """The same, but nothing for a place that was said before."""
    said: set[str] = set()

    def first(*arguments: Any) -> str:
        where = place(*arguments)
        known = where in said
        said.add(where)
        return "" if known else where

    return first


def shards(place: Path) -> dict[str, list[int]]:
    """What tells a file from another one of its name and content: inode and time of writing."""
    stats = {path.name: path.stat() for path in place.glob("*.safetensors")} if place.is_dir() else {}
    return {name: [stat.st_ino, stat.st_mtime_ns] for name, stat in stats.items() if not name.startswith(".")}


def moments(folder: Path, arguments: list[str]) -> Iterator[dict[str, Any]]:
    """Each moment of a merge: what was there when it was killed, and what the same command made of it."""
    out, aside = folder / PLACE, folder / f".{PLACE}.partial"
    for at in range(1, 1000):
        code = ended(forked(folder, arguments, lambda: arm(folder, at, signal.SIGKILL)))  # noqa: B023
        found = {"code": code, "out": out.is_dir(), "whole": shards(out if out.is_dir() else aside)}
        if code == 0:
            return
        again = ended(forked(folder, arguments))
        found |= {"again": again, "said": (folder / "said").read_text(), "after": shards(out)}
        found["beside"] = sorted({path.name for path in folder.iterdir()} - {"said", "moment", PLACE})
        kept = folder / f"kept-{at}"
        out.rename(kept)
        yield found | {"moment": (folder / "moment").read_text(), "kept": str(kept)}
        for left in (aside, folder / "moment"):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def beside_another(folder: Path, arguments: list[str], at: int) -> dict[str, Any]:
    """A merge beside one that is stopped in mid-work, which then goes on."""
    first = forked(folder, arguments, lambda: arm(folder, at, signal.SIGSTOP))
    found: dict[str, Any] = {"code": ended(first), "moment": (folder / "moment").read_text()}
    found |= {"second": ended(forked(folder, arguments)), "said": (folder / "said").read_text()}
    os.kill(first, signal.SIGCONT)
    return found | {"first": ended(first), "kept": str(folder / PLACE)}


def everything_imported() -> None:
    """Imports what a merge needs; no operation of torch may run in a process that forks."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    from qlora_cli import display, display_merge, merging  # noqa: F401


if __name__ == "__main__":
    run, folder = sys.argv[1], Path(sys.argv[2])
    for name in ("killed", "beside"):
        with contextlib.suppress(FileExistsError):
            (folder / name).mkdir(parents=True)
    everything_imported()
    killed = list(moments(folder / "killed", ["merge", run, "--out", str(folder / "killed" / PLACE), "--no-verify"]))
    beside = folder / "beside"
    pair = beside_another(beside, ["merge", run, "--out", str(beside / PLACE), "--no-verify"], len(killed) // 2)
    print(json.dumps({"killed": killed, "beside": pair}))
