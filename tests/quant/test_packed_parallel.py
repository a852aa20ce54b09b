"""Packed layers on two processes, sharded over them, and compiled: the same bytes, outputs and gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qlora_cli.quant.packed import Storage
from tests.conftest import REPOSITORY
from tests.quant.parallel_worker import IDS, adapted, gradients, loss

KINDS = ("nf4", "int2")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two processes found, by way, data type and process."""
    folder = tmp_path_factory.mktemp("parallel")
    command = [sys.executable, "-m", "tests.quant.parallel_worker", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([*command, rank, *KINDS], cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    try:
        for process in started:
            _, told = process.communicate(timeout=120)
            assert process.returncode == 0, told
    finally:
        for process in started:
            process.kill()
    return folder


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_two_processes_are_those_of_one(found, kind):
    model = adapted(Storage(kind))
    loss(model(IDS)).backward()
    wanted = gradients(model)
    assert len(wanted) == 4
    for way in ("ddp", "fsdp"):
        for rank in (0, 1):
            theirs = load_file(found / f"{way}-{kind}-{rank}")
            assert max(relative(theirs[name], grad) for name, grad in wanted.items()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_storage_comes_back_byte_for_byte_and_computes_the_same(found, kind):
    """Codes are flat bytes of one type, so `fully_shard` cuts them in two; scales are buffers, whole everywhere."""
    model = adapted(Storage(kind))
    logits = model(IDS).detach().chunk(2)
    codes = sum(parameter.numel() for parameter in model.parameters() if parameter.dtype == torch.uint8)
    stored = {name: tensor for name, tensor in model.state_dict().items() if "head" not in name}
    assert {tensor.dtype for tensor in stored.values()} == {torch.uint8, torch.float32}
    for rank in (0, 1):
        theirs = load_file(found / f"fsdp-{kind}-{rank}")
        assert int(theirs["bytes here"]) == codes / 2
        assert torch.equal(theirs["logits"], logits[rank])
        assert all(torch.equal(theirs[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize(
    "storage", [Storage("nf4"), Storage("int2"), Storage("nf2", double_quant=False), Storage("int4", zero_point=True)]
)
def test_a_compiled_model_is_one_graph_and_computes_what_it_did(storage):
    """By a backend that needs no compiler; dynamo and autograd's tracer are those of every backend."""
    model = adapted(storage)
    logits = model(IDS)
    loss(logits).backward()
    wanted = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = compiled(IDS)
    loss(found).backward()
    assert torch.equal(found, logits)
    assert max(relative(grad, wanted[name]) for name, grad in gradients(model).items()) < 1e-6
