"""How much memory a run may take on its device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

NO_LIMIT = 1 << 60
"""A control group of the first version writes a number beyond all memory where it has no limit."""


class Room(NamedTuple):
    """free_bytes: what the process can take beside what it has. held_bytes: what it has, the model among it."""

    free_bytes: int
    held_bytes: int


def room_on(device: torch.device) -> Room:
    """What there is now on a device; on a CPU an equal share for each process of a launch.

    Of a GPU the allocator first gives back what it keeps for nobody: what it holds then are segments in use.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return Room(torch.cuda.mem_get_info(device)[0], torch.cuda.memory_reserved(device))
    free = min([_kilobytes("meminfo", "MemAvailable") or _all_memory(), *limits(Path("/"))])
    return Room(free // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), _kilobytes("self/status", "RssAnon") or 0)


def limits(root: Path) -> Iterator[int]:
    """Bytes that each control group of this process may still take, where it has a limit; of both versions of groups.

    Cached files of a group are counted as free, as MemAvailable does. root: of the file system.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:  # no Linux
        return
    groups = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top, names = (groups / "memory", V1) if controllers else (groups, V2)
        folder = top / path.lstrip("/")
        for one in (folder, *folder.parents):
            yield from _left(one, names)
            if one == top:
                break


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")
"""Files of a control group: its limit, what it takes; and the line of memory.stat that counts its cached files."""


def _left(group: Path, names: tuple[str, str, str]) -> Iterator[int]:
    try:
        limit, taken = ((group / name).read_text(encoding="ascii").strip() for name in names[:2])
        stat = dict(line.split(" ", 1) for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:  # inside a container the path may be that of the host, whose folders are not there
        return
    if limit.isdigit() and int(limit) < NO_LIMIT:
        yield max(0, int(limit) - int(taken) + int(stat.get(names[2], 0)))


def _kilobytes(file: str, name: str) -> int | None:
    """Bytes by a line of a file in /proc; None where there is none, as beside Linux."""
    try:
        lines = Path("/proc", file).read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:")), None)


def _all_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
