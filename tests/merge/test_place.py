"""Where a merged model is run: on the device, in memory, or from the disk, a layer at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qlora_cli.merge import place
from qlora_cli.merge.place import available_memory, load_merged, manner_of
from qlora_cli.model.heads import TASKS
from tests.architectures import PAIRS, outputs, rows_of
from tests.conftest import REPOSITORY

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("on_gpu", "in_memory", "device", "expected"),
    [
        (0, 120, CPU, ("whole", CPU)),
        (0, 119, CPU, ("streamed", CPU)),
        (120, 0, GPU, ("whole", GPU)),
        (119, 120, GPU, ("whole", CPU)),
        (119, 119, GPU, ("streamed", CPU)),
    ],
)
def test_a_model_runs_where_it_fits_with_some_headroom(monkeypatch, on_gpu, in_memory, device, expected):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (on_gpu, 1 << 40))
    monkeypatch.setattr(place, "available_memory", lambda: in_memory)
    assert manner_of(100, device) == expected


def test_what_memory_is_there_is_what_the_system_tells(monkeypatch):
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_memory() <= whole
    monkeypatch.setattr(Path, "read_text", lambda path: "MemTotal: 3 kB\nMemAvailable:  2 kB\n")
    assert available_memory() == 2048
    monkeypatch.setattr(Path, "read_text", lambda path: "MemTotal: 3 kB\n")
    assert available_memory() == whole


@pytest.mark.parametrize(("name", "task"), [pair for pair in PAIRS if not TASKS[pair[1]].has_head])
def test_a_streamed_model_says_what_a_whole_one_says_and_leaves_no_file(
    architecture, tmp_path, monkeypatch, capfd, name, task
):
    folder = architecture(name)
    monkeypatch.chdir(tmp_path)
    rows, before = rows_of(task), sorted(folder.rglob("*"))
    for dtype in (torch.float32, torch.bfloat16):
        capfd.readouterr()
        whole, streamed = (load_merged(folder, task, dtype, how, CPU) for how in ("whole", "streamed"))
        assert "offload" not in "".join(capfd.readouterr())
        tables = [m.weight for m in streamed.modules() if isinstance(m, nn.Embedding) and m.num_embeddings != 259]
        resident = [parameter for parameter in streamed.parameters() if parameter.device.type != "meta"]
        assert {*map(id, resident)} == {*map(id, tables)}, "nothing but small tables lies in memory"
        assert streamed.dtype == whole.dtype == dtype
        torch.testing.assert_close(outputs(streamed, rows), outputs(whole, rows), rtol=0, atol=0)
    assert (list(tmp_path.iterdir()), sorted(folder.rglob("*"))) == ([], before)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' account of memory")
def test_a_streamed_model_never_lies_in_memory(tmp_path):
    command = [sys.executable, "-m", "tests.streamed_memory", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["size"] > 2e8
    assert found["streamed"]["own"] + found["streamed"]["mapped"] < found["size"] / 2, found
    assert found["whole"]["own"] + found["whole"]["mapped"] > 0.9 * found["size"], "else nothing is measured"
    assert found["streamed"]["logits"] == pytest.approx(found["whole"]["logits"], rel=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
