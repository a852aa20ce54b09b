"""What a data source consists of: files on disk, those of a folder or of a pattern, or a data set of the hub."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from qlora_cli.data.hub import HubData, default_split
from qlora_cli.data.readers import KNOWN_TYPES, DataFile, suffix_of
from qlora_cli.data.rows import BEGINNING, Mark, Read, Role, near_names
from qlora_cli.errors import UserError
from qlora_cli.recipe.schema import Source

Part = DataFile | HubData

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]\w{0,7}")  # .jsonl is one, the .0 of owner/corpus-v1.0 is not
_NOTES = re.compile(r"dataset_infos?\.json|dataset_dict\.json")
_SAVED_NOTES = re.compile(r"state\.json|cache-.*\.arrow")


@dataclass(frozen=True, slots=True)
class Resolved:
    """The parts of a source in the order they are read. num_ignored: files beside them that hold no rows."""

    parts: tuple[Part, ...]
    num_ignored: int = 0


class SourceMark(NamedTuple):
    """A place in a source. num_rows: rows of the source before it, bad ones too; source.limit counts them."""

    part: int = 0
    mark: Mark = BEGINNING
    num_rows: int = 0


def read_source(source: Source, role: Role, start: SourceMark | None = None) -> Iterator[tuple[int, Read]]:
    """The source's rows behind `start`, bad ones too, each with the index of its part; at most the first source.limit.

    Raises UserError where a part is missing or broken, and where there is no row at all.
    """
    yield from read_parts(resolve(source, role).parts, source, start or SourceMark())


def read_parts(parts: Sequence[Part], source: Source, start: SourceMark) -> Iterator[tuple[int, Read]]:
    """As read_source, for a source that is resolved."""
    num_rows = start.num_rows
    for index in range(start.part, len(parts) if num_rows != source.limit else 0):
        for read in parts[index].read(start.mark if index == start.part else BEGINNING):
            num_rows += 1
            yield index, read
            if num_rows == source.limit:
                return
    if num_rows == 0:
        raise UserError(source.path, "holds no rows", "name a source with at least one row")


def resolve(source: Source, role: Role) -> Resolved:
    """What source.path means: a file, a folder, a pattern with * ? [ ] or **, or a hub id, in this order.

    A folder is all files of a known type in it and below it, by their paths; hidden ones are left out, and a folder
    that links lead to twice is read once. A pattern means files likewise. source.split keeps those with the split as a
    word in their path below the folder: data/train-00000-of-00002.parquet.
    Raises UserError where nothing is there, and for what cannot be read as rows.
    """
    path = os.path.expanduser(source.path)
    if os.path.isdir(path):
        return _among(source, path, _files(path))
    if os.path.lexists(path):
        return Resolved((_file(source, path),))
    if glob.has_magic(path):
        folder, files = _matching(path)
        return _among(source, folder, files)
    if _on_hub(source.path):
        split = source.split or default_split(source.path, source.name, role)
        return Resolved((HubData(source.path, source.name, split, source.streaming),))
    try:
        os.lstat(path)
    except PermissionError as error:  # of a folder above it
        what = f"cannot be read: {error.strerror}"
        raise UserError(path, what, "check the folder and its permissions") from error
    except OSError:
        pass
    raise UserError(path, "no such file" + near_names(Path(path)), "correct the path of the data source")


def _on_hub(path: str) -> bool:
    """Whether a path that is not there means the hub: it has the form of a hub id, not of a file."""
    if not _HUB_ID.fullmatch(path):
        return False
    folder, name = os.path.split(path)
    in_folder = folder != "" and os.path.isdir(folder)
    return not in_folder and not _FILE_SUFFIX.fullmatch(Path(name).suffix)


# ── one file ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _file(source: Source, path: str) -> DataFile:
    """The one file that is named."""
    if not os.path.isfile(path):
        raise UserError(path, "is not a regular file", "name a file on disk")
    for key, value in (("split", source.split), ("name", source.name)):
        if value is not None:
            raise UserError(path, f"{key} is set, but a file has none", f"remove {key}, or name a folder or a hub id")
    if suffix_of(path) is None:
        raise UserError(path, f"unknown file type {Path(path).suffix!r}", f"use one of {KNOWN_TYPES}")
    return _filled(path)


def _filled(path: str) -> DataFile:
    """The file, if it holds anything."""
    try:
        size = os.stat(path).st_size
    except OSError as error:  # a folder that lets us list it but not look at its files
        what = f"cannot be read: {error.strerror}"
        raise UserError(path, what, "check the file and its permissions") from error
    if size == 0:
        raise UserError(path, "the file is empty", "name a file with at least one row")
    return DataFile(path)


# ── a folder or a pattern ────────────────────────────────────────────────────────────────────────────────────────────


def _among(source: Source, folder: str, found: list[str]) -> Resolved:
    """The files that hold rows, of those found below the folder."""
    if source.name is not None:
        raise UserError(source.path, "name is set, but files have none", "remove name: it belongs to hub data sets")
    known = [path for path in found if suffix_of(path) is not None and not _is_note(path)]
    word = re.compile(rf"(?<![^\W_]){re.escape(source.split)}(?![^\W_])") if source.split is not None else None
    kept = [path for path in known if word is None or word.search(os.path.relpath(path, folder))]
    if not kept:
        raise _nothing(source, folder, found, known)
    return Resolved(tuple(_filled(path) for path in kept), len(found) - len(known))


def _is_note(path: str) -> bool:
    """Whether a file is one that `datasets` writes beside those of rows: a description, or what it computed once."""
    folder, name = os.path.split(path)
    if _NOTES.fullmatch(name):
        return True
    return bool(_SAVED_NOTES.fullmatch(name)) and os.path.exists(os.path.join(folder, "dataset_info.json"))


def _nothing(source: Source, folder: str, found: list[str], known: list[str]) -> UserError:
    """What is said where no file is left, with what is there instead."""
    if not os.path.isdir(folder):
        return UserError(source.path, f"no file matches: there is no folder {folder}", "correct the path")
    if known:
        there = _few(os.path.relpath(path, folder) for path in known)
        what = f"split is {source.split!r}, and no file has this word in its path: {there}"
        return UserError(source.path, what, "correct split, or remove it to read all of them")
    if found:
        types = Counter(Path(path).suffix or "no suffix" for path in found)
        seen = ", ".join(f"{number:,} with {suffix}" for suffix, number in types.most_common(5))
        return UserError(source.path, f"no file of a known type, only {seen}", f"use one of {KNOWN_TYPES}")
    there = _few(name for name in os.listdir(folder) if not name.startswith("."))
    what = "the folder holds no files" if os.path.isdir(os.path.expanduser(source.path)) else "no file matches"
    return UserError(source.path, f"{what}; in {folder}: {there}", "correct the path of the data source")


def _few(names: Iterable[str]) -> str:
    """The first five names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 5:,} more" if len(ordered) > 5 else ""
    return (", ".join(ordered[:5]) or "nothing") + more


def _matching(pattern: str) -> tuple[str, list[str]]:
    """The folder before the first special character, and the files below it that match the pattern.

    Not glob.glob: its ** follows links to folders above them, 40 levels deep, in every order.
    """
    parts = Path(pattern).parts
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    folder, special = str(Path(*parts[:first])), parts[first:]
    depth = None if "**" in special else len(special)
    files = _files(folder, depth)
    return folder, [path for path in files if _matches(Path(os.path.relpath(path, folder)).parts, special)]


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a pattern; ** stands for any number of them."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[index:], pattern[1:]) for index in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _files(folder: str, depth: int | None = None) -> list[str]:
    """The files below a folder, at most `depth` names down, sorted, without hidden ones."""
    return sorted(_walk(folder, depth), key=lambda path: Path(path).parts)


def _walk(folder: str, depth: int | None) -> Iterator[str]:
    """The same in any order; each folder once, however many links lead to it.

    Raises UserError for a folder that cannot be listed: its rows would be missing without a word. For the same reason
    a link that leads nowhere counts as a file.
    """
    seen: set[tuple[int, int]] = set()
    top = len(Path(folder).parts)
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_unlistable):
        status = os.stat(parent)
        is_seen = (status.st_dev, status.st_ino) in seen
        seen.add((status.st_dev, status.st_ino))
        is_deepest = depth is not None and len(Path(parent).parts) - top + 1 >= depth
        folders[:] = [] if is_deepest or is_seen else sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = os.path.join(parent, name)
            if not is_seen and not name.startswith(".") and (os.path.isfile(path) or not os.path.exists(path)):
                yield path


def _unlistable(error: OSError) -> None:
    """Called by os.walk where it would pass over a folder."""
    if not isinstance(error, FileNotFoundError):
        what = f"cannot be listed: {error.strerror}"
        raise UserError(error.filename, what, "check the folder and its permissions") from error
