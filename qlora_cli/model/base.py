"""The frozen base model: found, loaded quantised, checked, and told in one line."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_cli.errors import Exit, UserError
from qlora_cli.kernels.isolation import evaluating
from qlora_cli.kernels.linear_cross_entropy import Tail
from qlora_cli.kernels.output_layer import PROVEN_ON, find_tail
from qlora_cli.model.added_tokens import ids_of, make_room
from qlora_cli.model.checks import check_complete, check_share_quantized, check_skipped, check_start_token
from qlora_cli.model.heads import NO_HEAD, Head, auto_class, find_head, for_task, needs_packed, set_padding, start_head
from qlora_cli.model.layer_kernels import choose, use_layer_kernels
from qlora_cli.model.placement import loaded_on, place, refuse_lean
from qlora_cli.model.prequantized import method_of, refuse_damaged, refuse_start, refuse_storage_keys
from qlora_cli.model.source import fetch_weights, file_of, locate, read_config
from qlora_cli.model.tokenizer import check_vocabulary, load_tokenizer, stop_token_ids
from qlora_cli.quant.bitsandbytes import compute_in, disarm_cpu_repacking, faster_quantiser
from qlora_cli.quant.gptq import BACKENDS, choose_kernel, make_trainable
from qlora_cli.quant.layers import (
    left_as_they_are,
    num_embeddings,
    quantization_config,
    skip_patterns,
    stored_tensors,
)
from qlora_cli.quant.linear4bit import work_round_cpu_dequantize
from qlora_cli.quant.quantised_on import quantised_on
from qlora_cli.recipe.schema import Model, Recipe

COUNTS_FROM_PADDING = frozenset(
    (
        *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text"),
        *("longformer", "mpnet", "ibert", "xmod", "luke", "markuplm", "lilt"),
    )
)
"""Models whose first position is pad_token_id + 1 (`create_position_ids_from_input_ids`), so those before are lost."""

INT8_ON_CPU = "on a CPU bitsandbytes trains int8 weights with unquantised activations, and evaluates with int8 ones"
"""What a user has to know, since what is measured is not quite what was trained (bitsandbytes 0.50.2)."""


@dataclass(frozen=True)
class Found:
    """A base before its weights are read: enough to check every row of data.

    config: transformers' own. task: model.task, for which it is loaded.
    """

    folder: Path
    tokenizer: Any
    stop_token_ids: frozenset[int]
    config: Any
    task: str

    @property
    def context(self) -> int | None:
        """Tokens that the model was made to read at once; None where its config does not say, as T5's does not."""
        config = self.config.get_text_config()
        positions: int | None = getattr(config, "max_position_embeddings", None)
        if positions is not None and config.model_type in COUNTS_FROM_PADDING:
            positions -= config.pad_token_id + 1
        return positions


@dataclass(frozen=True)
class Base(Found):
    """A frozen base model and what belongs to it.

    head: in fp32, new or of the checkpoint; an adapter trains it. added_ids: of tokens whose rows an adapter trains.
    """

    model: Any
    compute_dtype: torch.dtype
    summary: str
    note: str = ""
    head: Head = NO_HEAD
    added_ids: tuple[int, ...] = ()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @cached_property
    def tail(self) -> Tail | None:
        """What the model does to its head's logits, proven by forward passes over a few tokens; None where unknown.

        Where it is known, losses are computed from hidden states, and logits of all tokens never exist.
        """
        ids = torch.zeros(PROVEN_ON, dtype=torch.int64, device=self.device)
        inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if self.task == "seq2seq_lm" else {})

        def run() -> torch.Tensor:
            with evaluating(self.model), self.compute():
                logits: torch.Tensor = self.model(**inputs, use_cache=False).logits
            return logits

        return find_tail(self.model, run)

    def compute(self) -> AbstractContextManager[Any]:
        """The context of every forward pass: fp32 adapters are multiplied in compute_dtype."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)


def default_device() -> torch.device:
    """The first CUDA device, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype_for(name: str, device: torch.device) -> torch.dtype:
    """The recipe's compute_dtype; `auto` is bfloat16 where the hardware multiplies it fast, else float32."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def find_base(recipe: Recipe) -> Found:
    """The recipe's base with its tokenizer and config, downloaded where it is remote; its weights are not.

    Raises UserError where the folder or its tokenizer are not fit to train on.
    """
    folder = locate(recipe.model)
    stored = read_config(folder)
    refuse_storage_keys(recipe.quantization, stored, folder)
    refuse_start(recipe.adapter, stored, folder)
    config = load_config(folder, recipe.model)  # first: what a task needs of a tokenizer is told of one that it fits
    tokenizer = load_tokenizer(folder, recipe.model)
    set_padding(config, tokenizer, recipe.model.task)
    check_start_token(config, recipe.model.task)
    return Found(folder, tokenizer, stop_token_ids(folder, tokenizer), config, recipe.model.task)


def load_config(folder: Path, model: Model) -> Any:
    """The model's config as transformers reads it, with the labels of the task.

    Raises UserError where it cannot be read, and for a task that the architecture cannot do.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code, local_files_only=True)
    except Exception as error:  # its classes check what a file says by raising what they like
        raise _unloadable(folder, error) from error
    return for_task(config, model, folder)


def load_base(recipe: Recipe, device: torch.device, found: Found | None = None, *, packed: bool = False) -> Base:
    """The recipe's base model on `device`, frozen, its linear weights quantised, in evaluation mode.

    What training.memory leaves in host memory comes to the device as it is read.
    packed: quantised by our own layers alone, whose weights can be changed and stored.
    Raises UserError where the folder, its weights or its tokenizer are not fit to train on.
    """
    found, kernels = found or find_base(recipe), choose(recipe.training, device)
    fetch_weights(recipe.model, found.folder)
    refuse_damaged(found.folder)
    dtype = compute_dtype_for(recipe.quantization.compute_dtype, device)
    refuse_lean(recipe, read_config(found.folder), found.folder)
    loads_on = loaded_on(recipe, device)
    with nullcontext() if loads_on == device else quantised_on(device):
        model, head = load_model(recipe, found, dtype, loads_on, packed=packed)
    use_layer_kernels(model, kernels)
    placed = place(model, recipe, device)
    int8_on_cpu = recipe.quantization.data_type == "int8" and device.type == "cpu"
    note = INT8_ON_CPU if int8_on_cpu else ""
    known = (found.folder, found.tokenizer, found.stop_token_ids, found.config, found.task)
    added = ids_of(found.tokenizer, recipe.model.added_tokens)
    return Base(*known, model, dtype, bytes_by_type(model) + told(head) + placed.words, note, head, added)


def told(head: Head) -> str:
    """The end of a summary: which modules are new, if any."""
    return f"; new, from the seed: {', '.join(head.new_modules)}" if head.new else ""


def load_model(
    recipe: Recipe, found: Found, dtype: torch.dtype, device: torch.device, *, packed: bool = False
) -> tuple[Any, Head]:
    """The model alone and its head: quantised while it loads, nothing trainable.

    Every weight is the checkpoint's, but for a new head, which starts at training.seed, and the rows of added tokens.
    """
    from qlora_cli.quant.plugin import BadWeight

    folder = found.folder
    head = find_head(folder, found.config, recipe.model)
    quantization = head.spared(recipe.quantization)
    skipped = skip_patterns(quantization)
    method = method_of(read_config(folder))
    attention = recipe.model.attn_implementation
    arguments: dict[str, Any] = {} if attention == "auto" else {"attn_implementation": attention}
    arguments |= {"key_mapping": dict(head.renamed)} if head.renamed else {}
    arguments["config"] = copy.deepcopy(found.config)
    if method in BACKENDS:
        arguments["config"] = choose_kernel(arguments["config"])
    elif method is None:  # else config.json says it, and even None would overrule that
        packed = packed or needs_packed(found.config, recipe.model.task, quantization)
        arguments["quantization_config"] = quantization_config(quantization, dtype, packed)
    try:
        with quiet_loading(), faster_quantiser():
            model, info = auto_class(recipe.model.task).from_pretrained(
                folder,
                dtype=dtype,
                device_map={"": device},
                trust_remote_code=recipe.model.trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                **arguments,
            )
    except torch.OutOfMemoryError:
        raise
    except BadWeight as error:
        raise UserError(f"{file_of(error.where, folder)}: {error.where}", error.what, error.todo) from error
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        raise _unloadable(folder, error) from error
    check_skipped(model, recipe.quantization.skip_modules)  # first: of a tied head the loader tells something else
    check_complete(folder, info, head)
    if method is not None:
        compute_in(model, dtype)  # before the head, which is in fp32
    start_head(model, head, recipe.training.seed)
    disarm_cpu_repacking(model)
    work_round_cpu_dequantize(model)
    if method is not None:
        make_trainable(model)
    elif recipe.quantization.data_type != "none":
        check_share_quantized(model, [*skipped, *left_as_they_are(model, recipe.quantization)])
    added = ids_of(found.tokenizer, recipe.model.added_tokens)
    check_vocabulary(found.tokenizer, num_embeddings(model), folder, added)
    if added:
        make_room(model, added)
    model.requires_grad_(False)
    return model.eval(), head


def _unloadable(folder: Path, error: Exception) -> UserError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "trust_remote_code" in str(error):
        return UserError(
            folder,
            "the model needs Python code that comes with it",
            "set model.trust_remote_code: true if you trust its source",
            Exit.REFUSED,
        )
    return UserError(
        folder,
        f"transformers cannot load this model: {lines[0]}",
        "check config.json, the weight files and model.attn_implementation",
    )


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars, no reports on stderr: what matters is checked and told by us."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    logger = logging.getLogger("bitsandbytes")
    bnb_level = logger.level
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        logger.setLevel(bnb_level)
        if bars:
            hf_logging.enable_progress_bar()


def bytes_by_type(model: nn.Module) -> str:
    """One line: how many bytes of the model lie in which type."""
    sizes: Counter[str] = Counter()
    for kind, tensor in stored_tensors(model):
        sizes[kind] += tensor.numel() * tensor.element_size()
    parts = [f"{readable_bytes(size)} {kind}" for kind, size in sizes.most_common()]
    return f"{readable_bytes(sum(sizes.values()))}: " + ", ".join(parts)


def readable_bytes(size: int) -> str:
    """A size with a decimal unit: 4.1 MB."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size} B"


NOT_THE_FUNCTION = {"_name_or_path", "transformers_version", "quantization_config", "use_cache", "architectures"}
"""Keys of a model's configuration that do not change what it computes, or that the stored tensors already tell."""


def fingerprint(model: Any) -> str:
    """SHA-256 over the base as loaded: its configuration, and every tensor as stored, packed bytes and scales alike.

    A new head is part of it, at the start that it has from the seed: the same at every load.
    To be taken before the first forward pass: an int8 layer moves its scales there.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in NOT_THE_FUNCTION}
    total = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for kind, tensor in stored_tensors(model):
        total.update(f"|{kind} {tuple(tensor.shape)} {tensor.dtype}|".encode())
        data = tensor.detach().contiguous().flatten().view(torch.uint8).cpu()
        total.update(data.numpy().data)
    return total.hexdigest()
