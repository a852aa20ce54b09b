"""Where prepared rows are kept, under a key of everything they depend on.

The key is over the bytes of the data, the tokenizer, the chat template, the options, and this package's code, so what
is kept is never stale and never made twice. It lies in $QLORA_CACHE, else in $XDG_CACHE_HOME/qlora, else
~/.cache/qlora; any folder of it may be deleted at any time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlora_cli.data.chat import ChatSettings
from qlora_cli.data.limits import Limits
from qlora_cli.data.lines import readable
from qlora_cli.data.readers import DataFile
from qlora_cli.data.rows import Role
from qlora_cli.data.sources import Part, Resolved
from qlora_cli.data.store import part_to_json
from qlora_cli.errors import Exit, UserError
from qlora_cli.recipe.schema import Source


@dataclass(frozen=True)
class Wanted:
    """What is to be prepared. side: which rows of eval_fraction are wanted: the trained ones, or those held out."""

    role: Role
    sources: Sequence[Source]
    settings: ChatSettings
    limits: Limits
    skip_bad: bool
    eval_fraction: float = 0.0
    seed: int = 0
    side: Role = "train"


def key_of(wanted: Wanted, resolved: Sequence[Resolved]) -> str:
    """The name of the folder: a hash of everything that the prepared rows, and what is told of them, depend on."""
    parts = [[(part_to_json(part), part.digest()) for part in found.parts] for found in resolved]
    num_ignored = [found.num_ignored for found in resolved]
    known = repr((code_version(), _options(wanted), num_ignored, parts))  # not JSON: a recipe's kwargs may hold a date
    return hashlib.sha256(known.encode()).hexdigest()[:32]


def stream_digest(wanted: Wanted, parts: Sequence[Sequence[Part]]) -> str:
    """The same for rows that are streamed, whose files are too long to be read for it: see `_outline`."""
    named = [[_outline(part) if isinstance(part, DataFile) else part.digest() for part in found] for found in parts]
    order = [(Path(__file__).parent / name).read_bytes() for name in ("order.py", "packing.py", "stream.py")]
    weights = [source.weight for source in wanted.sources]
    return hashlib.sha256(repr((code_version(), order, _options(wanted), weights, named)).encode()).hexdigest()


def _outline(file: DataFile) -> tuple[str, int, str]:
    """Path, size, and SHA-256 of the first and last 64 KiB of a file."""
    with readable(file.path), open(file.path, "rb") as opened:
        size = os.path.getsize(file.path)
        ends = hashlib.sha256(opened.read(_END))
        opened.seek(max(0, size - _END))
        ends.update(opened.read())
        return file.path, size, ends.hexdigest()


_END = 2**16


def _options(wanted: Wanted) -> tuple[Any, ...]:
    """What of the recipe and the tokenizer the prepared rows depend on, besides the data."""
    settings = asdict(wanted.settings)
    settings["tokenizer"] = hashlib.sha256(
        wanted.settings.tokenizer.encode()
    ).digest()  # its megabytes are slow to quote
    if not wanted.settings.is_dated:
        del settings["today"]
    sources = [
        (source.path, source.format, source.template and source.template.model_dump(), source.limit)
        for source in wanted.sources
    ]
    split = (wanted.eval_fraction, wanted.seed, wanted.side) if wanted.eval_fraction else ()
    return settings, sources, asdict(wanted.limits), wanted.skip_bad, split


NOT_PREPARING = {"cache.py", "order.py", "packing.py", "statistics.py", "stream.py", "view.py"}
"""Modules of this room that no prepared row depends on."""


@cache
def code_version() -> tuple[str, ...]:
    """A hash of the code that prepares rows, and the versions of the libraries that do."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name not in NOT_PREPARING:
            code.update(path.read_bytes())
    return (code.hexdigest(), *(version(name) for name in ("tokenizers", "jinja2", "pyarrow")))


def cache_folder() -> Path:
    """Where prepared rows are kept; a temporary folder where the home cannot be written.

    Raises UserError where $QLORA_CACHE cannot be made, or the temporary folder is another user's.
    """
    named = os.environ.get("QLORA_CACHE")
    home = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "qlora")
    folder = Path(os.path.expanduser(named or home)) / "prepared"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if named:
            raise _refused(Path(named), error) from error
        return _temporary()
    return folder if named or os.access(folder, os.W_OK | os.X_OK) else _temporary()


def _temporary() -> Path:
    """A folder of our own where anybody may make one: what another user has put there first is not taken."""
    folder = Path(tempfile.gettempdir()) / f"qlora-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.lstat().st_uid != os.getuid():
            todo = "set QLORA_CACHE to a folder of your own"
            raise UserError(folder, "belongs to another user", todo, Exit.ENVIRONMENT)
        (folder / "prepared").mkdir(exist_ok=True)
    except OSError as error:
        raise _refused(folder, error) from error
    return folder / "prepared"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets one process prepare a folder: the ranks of a launch, or two runs on the same data, wait for the first."""
    try:
        file = folder.with_suffix(".lock").open("w")
    except OSError as error:
        raise _refused(folder.parent, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise _refused(folder.parent, error) from error
        yield


def _refused(folder: Path, error: OSError) -> UserError:
    """The error for a folder that cannot be written."""
    what = f"prepared rows cannot be kept here: {error.strerror or error}"
    return UserError(folder, what, "set QLORA_CACHE to a folder that you can write", Exit.ENVIRONMENT)
