"""A merged folder in the making: beside its place until it is whole, and taken up again by the same merge."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_cli.errors import Exit, UserError
from qlora_cli.model.safetensors_stream import disk
from qlora_cli.model.whole_folder import replace_text, sync

INPUTS = ".inputs.json"
"""In the folder while it is made: what is merged of what, and how."""


def place_of(out: Path) -> Path:
    """Where a merged folder is made: on the same file system, hidden beside its place."""
    out = out.absolute()
    return out.with_name(f".{out.name}.partial")


@contextmanager
def made_aside(out: Path, inputs: Mapping[str, Any], num_bytes: int) -> Iterator[Path]:
    """A folder that becomes `out` when the block succeeds; what is left of a merge of the same inputs is in it.

    It is kept when the block fails with a file of weights whole, so that the same command goes on.
    inputs: JSON of all that decides the content. num_bytes: of the whole.
    Raises UserError for a place that is taken, too small, or where another process works.
    """
    refuse_taken(out)
    aside, text = place_of(out), json.dumps(inputs, indent=1, sort_keys=True)
    with disk(out, num_bytes):
        aside.mkdir(parents=True, exist_ok=True)
    with _alone(aside):
        begun = (aside / INPUTS).is_file() and (aside / INPUTS).read_text() == text
        if not begun:
            _empty(aside)
        try:
            with disk(out, num_bytes):
                if not begun:
                    replace_text(aside / INPUTS, text)
            _check_room(out, aside, num_bytes)
            yield aside
        except BaseException:
            if not any(aside.glob("*.safetensors")):  # nothing whole to go on with
                shutil.rmtree(aside, ignore_errors=True)
            raise
        refuse_taken(out)  # by now
        with disk(out, num_bytes):
            for path in (*aside.iterdir(), aside):
                sync(path)
            aside.rename(out)  # onto nothing, or an empty folder; anything else fails
            (out / INPUTS).unlink()  # last: without it, what a kill leaves aside would be nobody's
            sync(out)
            sync(out.absolute().parent)


def refuse_taken(out: Path) -> None:
    """Refuses a place with something in it: nothing is overwritten."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(
            out, "it exists and is not an empty folder; nothing is overwritten", "name a new folder with --out"
        )


def refuse_inside(out: Path, inputs: Mapping[str, Path]) -> None:
    """Refuses a place inside a folder that is read, by what that folder is: its files would not be its own any more."""
    for what, folder in inputs.items():
        if Path(os.path.realpath(out)).is_relative_to(folder.resolve()):  # resolve() would stumble over a loop of links
            raise UserError(out, f"is inside {what}, {folder}", "name a folder beside it")


@contextmanager
def _alone(aside: Path) -> Iterator[None]:
    """Owns the folder until the block ends or the process dies."""
    try:
        descriptor = os.open(aside, os.O_RDONLY)
    except FileNotFoundError:
        raise _in_use(aside) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(aside) from None
        if not (aside.exists() and os.path.samestat(aside.stat(), os.fstat(descriptor))):
            raise _in_use(aside)  # who owned it has given it its name, or removed it, since it was opened
        yield
    finally:
        os.close(descriptor)


def _in_use(aside: Path) -> UserError:
    return UserError(aside, "another process is merging there", "wait for it to end", Exit.IN_USE)


def _empty(aside: Path) -> None:
    """Removes the files of another merge; a folder with one of anybody else's is refused."""
    names = [path for path in aside.iterdir() if path.name not in (INPUTS, f".{INPUTS}.tmp")]
    if names and not (aside / INPUTS).is_file():
        raise UserError(aside, "is there and was not left by a merge", "move it away, or name another --out")
    for path in names:
        path.unlink()


def _check_room(out: Path, aside: Path, num_bytes: int) -> None:
    there = sum(path.stat().st_size for path in aside.iterdir() if path.name != INPUTS)
    free = shutil.disk_usage(aside).free
    if free + there < num_bytes:
        what = f"{num_bytes:,} bytes are needed and {free + there:,} are free"
        raise UserError(out, what, "free space or name another", Exit.FAILED)
