"""Where a merged model is run: four times the size of the 4-bit one, it may fit neither the GPU nor the memory."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_cli.merge.certificate import Manner
from qlora_cli.model.heads import auto_class

HEADROOM = 1.2
"""Memory that a model takes when it runs, by its weights."""


def manner_of(num_bytes: int, device: torch.device) -> tuple[Manner, torch.device]:
    """How a model of so many bytes is run, and where: on the device, on the CPU, or from the disk."""
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] >= HEADROOM * num_bytes:
        return "whole", device
    if available_memory() >= HEADROOM * num_bytes:
        return "whole", torch.device("cpu")
    return "streamed", torch.device("cpu")


def available_memory() -> int:
    """Bytes that a process may still take without swapping; all of the memory where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def load_merged(folder: Path, task: str, dtype: torch.dtype, manner: Manner, device: torch.device) -> Any:
    """A merged folder as anybody loads it.

    Streamed: weights stay in its files, and each module reads its own when it runs (accelerate's disk offload).
    """
    how: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    place: dict[str, Any] = {"": "disk" if manner == "streamed" else device}
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of weights on the disk, where they are meant to be
    try:
        model = auto_class(task).from_pretrained(folder, device_map=place, **how)
    finally:
        logger.setLevel(level)
    if manner == "streamed":
        read_tables(model)
    return model


def read_tables(model: Any) -> None:
    """Brings the embeddings of a streamed model that are not of tokens into memory.

    They are small, and models look at such a table without calling it, as DeBERTa at that of its relative positions:
    it would not be read.
    """
    from accelerate.hooks import remove_hook_from_module

    num_tokens = model.get_input_embeddings().num_embeddings
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings != num_tokens:
            hook: Any = module._hf_hook
            hook.pre_forward(module)
            remove_hook_from_module(module)
