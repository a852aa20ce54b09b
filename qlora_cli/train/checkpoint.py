"""Checkpoints: weights, optimizer, random state and cursor after a step, in folders that are whole or not there.

Old ones are deleted once a new one is safely there. Only safetensors and JSON are written or read.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from qlora_cli.errors import Exit, UserError
from qlora_cli.model.adapter import WEIGHTS, AdapterState, adapter_state, write_adapter
from qlora_cli.model.owner import Owner
from qlora_cli.model.whole_folder import fault, publish
from qlora_cli.train.optimizers import optimizer_state, restore_optimizer

NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Progress:
    """Where a run stands after an optimizer step, beside the weights and the optimizer.

    step: optimizer steps done, which is also the cursor into prepared data, the order of rows is a function of it.
    place: the cursor into streamed data.
    random: one dict of generator states per process.
    logged: what the next logged line has summed up so far.
    best: the best evaluation so far, where the recipe asks for it.
    """

    step: int
    random: list[dict[str, Tensor]]
    logged: dict[str, float]
    place: dict[str, Any] | None = None
    best: dict[str, Any] | None = None


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in memory. state: state.json's text. copied: when the tensors are there, None where they are."""

    step: int
    adapter: AdapterState
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]
    state: str
    copied: torch.cuda.Event | None


def snapshot(model: Any, optimizer: Optimizer, progress: Progress, owner: Owner) -> Snapshot:
    """A checkpoint in memory, which the steps that follow do not change.

    A GPU's tensors are copied when it gets there, before the next step's work; nobody waits for that here.
    """
    adapter = adapter_state(model, owner)
    tensors, rest = optimizer_state(optimizer)
    state = {"step": progress.step, "logged": progress.logged, "optimizer": rest, "processes": len(progress.random)}
    if progress.place is not None:
        state["place"] = progress.place
    if progress.best is not None:
        state["best"] = progress.best
    held = replace(adapter, tensors=host_copies(adapter.tensors)), host_copies(tensors)
    random = {f"{rank}.{name}": t for rank, states in enumerate(progress.random) for name, t in states.items()}
    copied = torch.cuda.Event() if any(tensor.is_cuda for tensor in adapter.tensors.values()) else None
    if copied is not None:
        copied.record()
    return Snapshot(progress.step, *held, random, json.dumps(state, indent=1), copied)


def host_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory, none sharing any; of a GPU's tensors pinned, and filled when the GPU gets there."""
    copies = {}
    for name, tensor in tensors.items():
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name] = copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
    return copies


def write_checkpoint(folder: Path, held: Snapshot, keep: int) -> Path:
    """Writes `folder`/step-NNNNNN and returns it; deletes all but the newest `keep` once it is safely there."""
    if held.copied is not None:
        held.copied.synchronize()

    def write(place: Path) -> None:
        write_adapter(held.adapter, place)
        save_file(held.optimizer, place / "optimizer.safetensors")
        save_file(held.random, place / "random.safetensors")
        (place / "state.json").write_text(held.state)

    path = publish(folder / f"step-{held.step:06d}", write)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The step folders, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's state.json."""
    step: int = json.loads((checkpoint / "state.json").read_bytes())["step"]
    return step


def newest_valid(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose manifest verifies; damaged ones are set aside as .broken, and told.

    Returns None where there is no checkpoint. Raises UserError where all are damaged: never a silent restart.
    """
    found = checkpoints(folder)
    for checkpoint in reversed(found):
        reason = fault(checkpoint)
        if not reason:
            return checkpoint
        aside = _free_name(checkpoint.with_name(f"{checkpoint.name}.broken"))
        checkpoint.rename(aside)
        say(f"{checkpoint} is damaged ({reason}): set aside as {aside.name}")
    if found or any(folder.glob("step-*.broken*")):
        raise UserError(
            folder,
            "every checkpoint is damaged",
            "restore one from a backup, or choose another output_dir",
            Exit.FAILED,
        )
    return None


def _free_name(path: Path) -> Path:
    number = 1
    candidate = path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate


def load_checkpoint(checkpoint: Path, model: Any, optimizer: Optimizer, processes: int) -> Progress:
    """Restores weights and optimizer, and returns where the run stood.

    Raises UserError where the checkpoint was written by another number of processes: the global batch would differ.
    """
    import peft

    state = json.loads((checkpoint / "state.json").read_bytes())
    if state["processes"] != processes:
        raise UserError(
            checkpoint,
            f"written by {state['processes']} processes, continued by {processes}: the global batch would differ",
            f"launch {state['processes']} processes",
        )
    tensors = load_file(checkpoint / WEIGHTS)
    wanted = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    if set(tensors) != wanted:
        odd = sorted(set(tensors) ^ wanted)
        raise UserError(checkpoint, f"its adapter is not this recipe's: {odd[0]}", "choose another output_dir")
    peft.set_peft_model_state_dict(model, tensors)
    restore_optimizer(optimizer, load_file(checkpoint / "optimizer.safetensors"), state["optimizer"])
    random: list[dict[str, Tensor]] = [{} for _ in range(processes)]
    for name, tensor in load_file(checkpoint / "random.safetensors").items():
        rank, kind = name.split(".")
        random[int(rank)][kind] = tensor
    return Progress(state["step"], random, state["logged"], state.get("place"), state.get("best"))
