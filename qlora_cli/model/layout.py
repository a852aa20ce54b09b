"""What the transformers class says about the tensors of its checkpoint."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_cli.errors import UserError
from qlora_cli.model.heads import auto_class
from qlora_cli.model.names import renamer
from qlora_cli.model.prequantized import refuse_unknown_form


@dataclass(frozen=True)
class Layout:
    """Names as in the live model; a checkpoint of another class or age has other ones (hub GPT-2 lacks a prefix).

    architecture: the class of the model; config: its own. parameters: with their shapes.
    """

    architecture: str
    config: Any
    live: Callable[[str], str | None]  # the name of a checkpoint tensor, None where the model has no such tensor
    parameters: Mapping[str, tuple[int, ...]]
    linear: frozenset[str]  # modules that LoRA can wrap, those of conv1d among them
    conv1d: frozenset[str]  # modules whose weight is stored (in_features, out_features)
    tied: frozenset[str]  # modules that share their weight with another
    embeddings: frozenset[str]  # modules whose weight is the input embedding's: it, and what is tied to it
    head: str | None  # the module that makes logits of a vocabulary

    def parameter(self, name: str) -> str | None:
        """The live name of a checkpoint tensor, or None where it is none of the parameters (a buffer)."""
        full = self.live(name)
        return full if full in self.parameters else None


@dataclass(frozen=True)
class Made:
    """What a merged model is made for: a task, and transformers' config with what the task says in it.

    Without one it is of the class that the base's config.json names.
    """

    task: str
    config: Any


def read_layout(folder: Path, compute_dtype: torch.dtype, made: Made | None = None) -> Layout:
    """Build the folder's model on the meta device, without memory, and read its names.

    Raises UserError as `meta_model` does, and for a class that keeps some weights in float32 beside compute_dtype.
    """
    from transformers.pytorch_utils import Conv1D

    model = meta_model(folder, made)
    if kept := _kept_in_fp32(model, compute_dtype):
        what = f"merging {type(model).__name__} in {compute_dtype} is not available yet"
        todo = "train it with quantization.compute_dtype: float32"
        raise UserError(folder, f"{what}: it keeps {', '.join(kept)} in float32", todo)
    shared = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    embedding = model.get_input_embeddings().weight
    return Layout(
        architecture=type(model).__name__,
        config=model.config,
        live=renamer(model),
        parameters={name: tuple(parameter.shape) for name, parameter in parameters.items()},
        linear=frozenset(n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)),
        conv1d=frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D)),
        tied=frozenset(name.rpartition(".")[0] for name, p in parameters.items() if shared[id(p)] > 1),
        embeddings=frozenset(name.rpartition(".")[0] for name, p in parameters.items() if p is embedding),
        head=next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None),
    )


def meta_model(folder: Path, made: Made | None = None) -> Any:
    """The model of a folder with ordinary layers, on the meta device: names and shapes without memory.

    Raises UserError where config.json is missing or damaged, of a checkpoint that is quantised in a way that does not
    load, or of a class that transformers does not have.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise UserError(folder / "config.json", f"cannot be read ({cause})", "name a transformers folder") from error
    if (stored := getattr(config, "quantization_config", None)) is not None:
        refuse_unknown_form({"quantization_config": stored}, folder)
        del config.quantization_config
    if made is not None:
        config = copy.deepcopy(made.config)
        vars(config).pop("quantization_config", None)
        with torch.device("meta"):
            return auto_class(made.task).from_config(config)
    architecture = (config.architectures or ["none"])[0]
    model_class = getattr(transformers, architecture, None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise UserError(
            folder / "config.json",
            f"merging architecture {architecture!r} is not available yet: transformers has no such class",
            "use the adapter unmerged",
        )
    with torch.device("meta"):
        return model_class(config)


def _kept_in_fp32(model: torch.nn.Module, compute_dtype: torch.dtype) -> list[str]:
    """Name patterns that transformers leaves in float32 (`PreTrainedModel._get_dtype_plan`, 5.23)."""
    always = getattr(model, "_keep_in_fp32_modules_strict", None) if compute_dtype != torch.float32 else None
    in_fp16 = getattr(model, "_keep_in_fp32_modules", None) if compute_dtype == torch.float16 else None
    return sorted({*(always or ()), *(in_fp16 or ())})
