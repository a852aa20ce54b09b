"""Folders that are whole or not there: written aside, synced, signed with a manifest, then renamed.

Order: temporary folder on the same file system, files, fsync of each and of the folders inside, manifest.json last,
fsync of the folder, rename, fsync of the parent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from qlora_cli.errors import Exit, UserError

MANIFEST = "manifest.json"

UNSIGNED = ("README.md",)
"""Files that people may edit: no part of the content."""

Files = dict[str, dict[str, int | str]]
"""Size and SHA-256 of each file of a folder, by its path in it."""


def publish(folder: Path, write: Callable[[Path], object]) -> Path:
    """Makes `folder` appear with all that `write` puts into it and a manifest, or not at all.

    The caller is the only one at work there, so that what lies aside is of a write that was killed.
    Raises UserError (exit 1) where the disk is full or the place cannot be written.
    """
    return _publish(folder, write, lambda files: folder)


def publish_new(folder: Path, write: Callable[[Path], object]) -> Path:
    """As `publish`, where others may be at work. Raises UserError for what lies aside, of whatever it is."""
    folder = folder.resolve()
    aside = _aside(folder)
    if aside.exists():
        what = "is there: another process is writing, or one was killed"
        raise UserError(aside, what, "delete it if nobody is at work, or choose another place")
    return _publish(folder, write, lambda files: folder)


def publish_by_content(parent: Path, write: Callable[[Path], object]) -> Path:
    """As `publish`, but the folder's name is the SHA-256 (hex) of its content: see `content_name`."""
    return _publish(parent / "new", write, lambda files: parent / _digest(files))


def content_name(folder: Path) -> str:
    """The SHA-256 (hex) over the names, sizes and digests in a folder's manifest; `fault` verifies the files."""
    return _digest(json.loads((folder / MANIFEST).read_bytes())["files"])


def _digest(files: Files) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.tmp")


def _publish(folder: Path, write: Callable[[Path], object], name: Callable[[Files], Path]) -> Path:
    """Writes beside `folder` and gives it the name that its files call for."""
    aside = _aside(folder)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write(aside)
        inside = sorted(aside.rglob("*"))
        for path in inside:
            if path.is_file():  # safetensors writes for its owner alone
                path.chmod(path.stat().st_mode | aside.stat().st_mode & 0o444)
            sync(path)
        files = [path for path in inside if path.is_file() and path.name not in UNSIGNED]
        described: Files = {str(p.relative_to(aside)): {"size": p.stat().st_size, "sha256": sha256(p)} for p in files}
        (aside / MANIFEST).write_text(json.dumps({"files": described}, indent=1))
        sync(aside / MANIFEST)
        sync(aside)
        named = name(described)
        if named != folder:
            shutil.rmtree(named, ignore_errors=True)  # of this very content, or damaged
        aside.rename(named)
        sync(folder.parent)
        return named
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) and "I/O" not in str(error):
            raise
        free = shutil.disk_usage(folder.parent).free if folder.parent.exists() else 0
        raise UserError(
            folder,
            f"cannot be written: {getattr(error, 'strerror', None) or error} ({free:,} bytes free)",
            "free space or mend the permissions, then run the same command again: what was saved is kept",
            Exit.FAILED,
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # of a failed write, which may have filled the disk


def replace_text(path: Path, text: str) -> None:
    """Writes a file that is at every moment either the old one or the new one."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text)
    aside.replace(path)


def sync(path: Path) -> None:
    """Forces a file's or a folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fault(checkpoint: Path, *, contents: bool = True) -> str:
    """What is wrong with a checkpoint, "" if its manifest verifies; without `contents` by the sizes of its files alone.

    Raises UserError where the disk fails to read it, which proves nothing against the checkpoint.
    """
    try:
        described = json.loads((checkpoint / MANIFEST).read_bytes())["files"]
        for name, facts in described.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["size"]:
                return f"{name} has {path.stat().st_size} bytes, {facts['size']} were written"
            if contents and sha256(path) != facts["sha256"]:
                return f"{name} has changed since it was written"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        raise UserError(
            checkpoint, f"cannot be read: {error.strerror}", "mend the disk or the permissions", Exit.FAILED
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return ""
