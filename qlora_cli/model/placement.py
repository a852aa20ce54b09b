"""Where a base's tensors lie under `training.memory`: on the device, or in host memory until they are asked for.

offload: the embedding stays in host memory, since a step reads a few of its rows. lean: the linear weights of all
layers too, of which two layers at a time are on the device. What is computed is the same to the last bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora_cli.errors import Exit, UserError
from qlora_cli.kernels.layer_stream import LayerStream
from qlora_cli.model.continued import as_continued
from qlora_cli.model.prequantized import method_of
from qlora_cli.model.streamed import stream_layers
from qlora_cli.quant.gptq import BACKENDS
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.rules import STORES_ITS_BASE
from qlora_cli.recipe.schema import Adapter

LESS_THAN_THE_MODEL = ("offload", "lean")
"""Values of training.memory under which a GPU does not hold the whole model."""


class Placed(NamedTuple):
    """What lies in host memory: streamed layers, and the embedding's bytes (0 where it is on the device)."""

    stream: LayerStream | None = None
    embedding_bytes: int = 0

    @property
    def host_bytes(self) -> int:
        """What it takes there, of each process."""
        return self.embedding_bytes + (0 if self.stream is None else self.stream.host_bytes)

    @property
    def left_out_bytes(self) -> int:
        """Of the model's own bytes those that the device does not have at any one time."""
        if self.stream is None:
            return self.embedding_bytes
        return self.embedding_bytes + sum(map(len, self.stream.hosts)) - sum(map(len, self.stream.slots))

    @property
    def words(self) -> str:
        """For the end of the line about the base; nothing where all is on the device."""
        if self.stream is None:
            return "; the embedding in host memory" if self.embedding_bytes else ""
        also = " and the embedding" if self.embedding_bytes else ""
        return f"; {len(self.stream.hosts)} layers{also} in host memory, two layers at a time on the device"


class Hosted(nn.Module):
    """Stands before a class of embeddings, whose table stays in host memory."""

    def forward(self, input: Tensor) -> Tensor:
        """Ids of any shape to (*shape, embedding_dim), on the device of the ids.

        Of a batch's ids there is a copy on the host (`tasks.padding.moved`); who views them first waits for the device.
        """
        ids = getattr(input, "on_host", None)
        found: Tensor = super().forward(input.cpu() if ids is None else ids)
        return found.pin_memory().to(input.device, non_blocking=True) if input.is_cuda else found.to(input.device)

    def __deepcopy__(self, memo: Any) -> Any:
        what = "names the embedding, which `training.memory` leaves in host memory"
        raise UserError("adapter.modules_to_save", what, "use training.memory: auto")


def can_stream(recipe: Recipe) -> bool:
    """Whether the recipe may have training.memory: lean; a base that is stored quantised may not, all the same."""
    started = recipe.adapter.init in STORES_ITS_BASE
    return (recipe.quantization.data_type != "int8" or started) and not recipe.adapter.use_dora


def refuse_lean(recipe: Recipe, config: dict[str, Any], folder: Path) -> None:
    """Refuses to stream a base that is stored in layers of others, or under a continued adapter with DoRA."""
    if recipe.training.memory != "lean":
        return
    method = method_of(config)
    stored = config.get("quantization_config") or {}
    what = f"`lean`, and {folder} is stored as {method}, whose layers cannot be streamed"
    if method in BACKENDS or (method == "bitsandbytes" and stored.get("load_in_8bit")):
        raise UserError("training.memory", what, "use offload, which leaves the layers on the GPU", Exit.REFUSED)
    if as_continued(recipe.adapter).use_dora:
        what = "`lean`, and the continued adapter has DoRA, for which PEFT reads the layers by itself"
        raise UserError("training.memory", what, "use offload, which leaves the layers on the GPU", Exit.REFUSED)


def loaded_on(recipe: Recipe, device: torch.device) -> torch.device:
    """Where a base is loaded: under lean in host memory, since the device need not hold it."""
    return torch.device("cpu") if recipe.training.memory == "lean" else device


def resident(recipe: Recipe) -> Recipe:
    """The recipe with the whole base where it computes, for who changes or stores it."""
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"memory": "auto"})})


def place(model: Any, recipe: Recipe, device: torch.device) -> Placed:
    """Puts a loaded base where training.memory has it; on a CPU, whose memory the host's is, it stays as it is."""
    if recipe.training.memory not in LESS_THAN_THE_MODEL or device.type == "cpu":
        return Placed()
    device = torch.empty(0, device=device).device  # with its index, as tensors have it
    adapter = as_continued(recipe.adapter)
    embeddings = hosted_embeddings(model, adapter)
    stream = None
    if recipe.training.memory == "lean":
        try:
            stream = stream_layers(model, device, adapter.modules_to_save)
        except torch.OutOfMemoryError as error:
            what = f"`lean`: {str(error).splitlines()[0]}"
            raise UserError("training.memory", what, "free host memory, or use offload", Exit.FAILED) from error
        move(model, device, embeddings)
    for embedding in embeddings:
        if device.type != "meta":
            embedding.to("cpu")
        kind: Any = type(embedding)
        embedding.__class__ = _hosted(kind)
    if device.type != "meta":
        whole: Any = type(model)
        model.__class__ = _computing_on(whole, device)
    tables = {id(tensor): tensor.nbytes for embedding in embeddings for tensor in _tensors(embedding)}
    return Placed(stream, sum(tables.values()))


def hosted_embeddings(model: Any, adapter: Adapter) -> list[nn.Embedding]:
    """The input embedding, and others with the same table, where no head multiplies with it and nothing adapts it."""
    table = model.get_input_embeddings()
    sharing = {name: module for name, module in model.named_modules() if getattr(module, "weight", 0) is table.weight}
    patterns = [re.escape(name) for name in adapter.modules_to_save]
    if isinstance(adapter.target_modules, list):
        patterns += [re.escape(name) for name in adapter.target_modules]
    elif adapter.target_modules != "all-linear":
        patterns.append(adapter.target_modules)
    for name, module in sharing.items():
        if not isinstance(module, nn.Embedding) or any(re.fullmatch(rf"(.*\.)?({one})", name) for one in patterns):
            return []
    return [module for module in sharing.values() if isinstance(module, nn.Embedding)]


def move(model: nn.Module, device: torch.device, but: list[nn.Embedding]) -> None:
    """Moves what a model has in host memory to the device, other than some modules and what is streamed."""
    for module in model.modules():
        if module in but:
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(device)
            if (state := getattr(parameter, "quant_state", None)) is not None:
                state.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


@cache
def _hosted(kind: type) -> type:
    return type(kind.__name__, (Hosted, kind), {"__module__": kind.__module__})


@cache
def _computing_on(kind: type, device: torch.device) -> type:
    """A model's class that tells where it computes, which transformers reads off its first parameter."""
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "device": property(lambda _: device)})
