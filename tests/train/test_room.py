"""How much memory a process may take, from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_cli.train.room import limits, room_on

MIB = 1 << 20
V1 = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def write_group(root: Path, path: str, names: tuple[str, ...], values: tuple[object, int, int]) -> None:
    folder = root / names[0] / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names[1:3], values, strict=False):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[3]} {values[2]}\nactive_file 7\n")


def write_own(root: Path, *lines: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize(("names", "line"), [(V1, "4:memory:/jobs/mine"), (V2, "0::/jobs/mine")])
def test_a_process_may_take_what_every_group_above_it_leaves(names, line, tmp_path):
    write_own(tmp_path, "9:name=systemd:/", "8:cpuset:/jobs", line)
    none = 9223372036854771712 if names is V1 else "max"
    write_group(tmp_path, "jobs/mine", names, (900 * MIB, 500 * MIB, 100 * MIB))
    write_group(tmp_path, "jobs", names, (800 * MIB, 700 * MIB, 0))
    write_group(tmp_path, "", names, (none, 900 * MIB, 0))
    assert list(limits(tmp_path)) == [500 * MIB, 100 * MIB]


def test_a_container_that_sees_the_hosts_path_has_the_limit_of_its_root(tmp_path):
    write_own(tmp_path, "4:memory:/docker/0123")
    write_group(tmp_path, "", V1, (64 * MIB, 70 * MIB, 0))
    assert list(limits(tmp_path)) == [0], "it is beyond its limit"


def test_no_groups_are_no_limit(tmp_path):
    assert list(limits(tmp_path)) == []
    write_own(tmp_path, "0::/")
    assert list(limits(tmp_path)) == []


def test_processes_of_a_launch_share_the_memory_of_a_cpu(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = room_on(device)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    shared = room_on(device)
    assert shared.free_bytes == pytest.approx(alone.free_bytes / 4, rel=0.3)
    held = torch.ones(64 * MIB // 4)
    assert room_on(device).held_bytes - shared.held_bytes >= 0.9 * held.nbytes
