"""The LoRA adapter: attached to a base, saved as a plain PEFT folder, loaded again."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_cli.errors import Exit, UserError
from qlora_cli.model.added_tokens import ROWS, check_tokens, token_indices, use_rows
from qlora_cli.model.base import Base
from qlora_cli.model.continued import CONFIG
from qlora_cli.model.fused import fuse_adapter
from qlora_cli.model.heads import TASKS
from qlora_cli.model.owner import Owner, refuse_other_base
from qlora_cli.model.source import read_json
from qlora_cli.model.streamed import Streamed
from qlora_cli.quant.gptq import package_layers
from qlora_cli.quant.layers import quantized_linear, quantized_modules
from qlora_cli.quant.linear4bit import reads_plainly
from qlora_cli.recipe.schema import Adapter

WEIGHTS = "adapter_model.safetensors"

_PEFT_S = re.compile(r"(^|\.)(base_model|base_layer|lora_\w+|default|modules_to_save|original_module|model)$|\.lora_")
"""Modules that PEFT has put into the model, and the model that it wraps."""


@dataclass(frozen=True)
class AdapterState:
    """What an adapter folder holds. tensors: by PEFT's names. config: PEFT's, as others are to read it."""

    tensors: dict[str, torch.Tensor]
    config: Any
    owner: Owner


def attach_adapter(base: Base, adapter: Adapter) -> Any:
    """The base wrapped in a PEFT model whose adapter weights are fp32 and alone require a gradient, a head with them.

    Draws A from torch's global generator: seed it before. Raises UserError for a target that matches nothing.
    """
    import peft

    if adapter.from_ is not None:
        return load_adapter(base, Path(adapter.from_), trainable=True)
    targets = target_modules(base, adapter)
    config = peft.LoraConfig(
        task_type=TASKS[base.task].peft_type,
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        init_lora_weights="gaussian" if adapter.init == "gaussian" else True,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        modules_to_save=[*dict.fromkeys([*adapter.modules_to_save, *base.head.modules])] or None,
        rank_pattern=adapter.rank_pattern,
        alpha_pattern=adapter.alpha_pattern,
        trainable_token_indices=token_indices(base.model, base.added_ids),
    )
    check_config(base.model, config, base.added_ids)
    model = peft.get_peft_model(base.model, config)
    check_patterns(model, adapter)
    use_rows(model, base.device)
    refuse_elsewhere(model, base)
    return fuse_adapter(in_fp32(model))


def load_adapter(base: Base, folder: Path, *, trainable: bool = False) -> Any:
    """The base with the adapter in `folder`, every tensor of the file used and none missing.

    Raises UserError where the folder is no readable LoRA adapter, or belongs to another architecture.
    """
    import peft
    from safetensors.torch import load_file

    names = adapter_tensor_names(folder)
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode = not trainable
        refuse_other_base(base.folder, folder, config.base_model_name_or_path)
        check_config(base.model, config, base.added_ids)
        with quiet_about_ties():
            model = peft.PeftModel.from_pretrained(base.model, str(folder), is_trainable=trainable, config=config)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            folder, f"the adapter does not fit this base: {reason}", "use the base it was trained on"
        ) from error
    expected = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    if names != expected:
        odd = sorted(names ^ expected)
        raise UserError(
            folder / WEIGHTS,
            f"{len(odd)} tensors do not match the base, such as {odd[0]}",
            "use the base that the adapter was trained on",
        )
    use_rows(model, base.device)
    refuse_elsewhere(model, base)
    if trainable:
        in_fp32(model)
    # again, now into fp32: PEFT had loaded modules_to_save into copies in the base's dtype
    peft.set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
    return fuse_adapter(model)


@contextmanager
def quiet_about_ties() -> Iterator[None]:
    """Without PEFT's warning of a tied weight that is trained on one side: a merge unties it, and says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        yield


def refuse_elsewhere(model: Any, base: Base) -> None:
    """Refuses an adapter part of which PEFT has put beside a weight that training.memory leaves in host memory."""
    for name, parameter in model.named_parameters():
        if ("lora_" in name or "modules_to_save" in name) and parameter.device.type != base.device.type:
            what = f"leaves what the adapter changes in host memory: {name.removeprefix('base_model.model.')}"
            raise UserError("training.memory", what, "use auto", Exit.REFUSED)


def adapter_tensor_names(folder: Path) -> set[str]:
    """The names of the tensors in a PEFT adapter folder; only safetensors is read, never a pickle."""
    from safetensors import SafetensorError, safe_open

    if not folder.is_dir():
        raise UserError(folder, "no such adapter folder", "name the adapter/ folder of a run")
    if read_json(folder / CONFIG, "a PEFT adapter folder needs it").get("peft_type") != "LORA":
        raise UserError(folder / CONFIG, "not a LoRA adapter", "name a LoRA adapter")
    path = folder / WEIGHTS
    if not path.exists():
        pickle = (folder / "adapter_model.bin").exists()
        found = "the weights are a pickle, which can run code when read" if pickle else f"no {WEIGHTS}"
        raise UserError(folder, found, "save the adapter as safetensors", Exit.REFUSED if pickle else Exit.USAGE)
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(path, f"damaged: {error}", "restore the file") from error


def save_adapter(model: Any, folder: Path, owner: Owner) -> None:
    """Writes the adapter as a plain PEFT folder, and which base it belongs to."""
    write_adapter(adapter_state(model, owner), folder)


def adapter_state(model: Any, owner: Owner) -> AdapterState:
    """The adapter as its folder holds it; the tensors are the model's own."""
    import peft

    # not model.state_dict(), which packs every quantised weight's scales and asks the device for each
    known = dict(chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)))
    tensors = peft.get_peft_model_state_dict(model, state_dict=known, save_embedding_layers=False)
    config = copy.copy(model.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = owner.name, True
    if config.modules_to_save:  # to which PEFT adds its own names of heads at every load
        config.modules_to_save = saved_in_full(model)
    if isinstance(config.target_modules, set):  # whose order is another one in every process
        config.target_modules = sorted(config.target_modules)
    return AdapterState({name: tensor.detach() for name, tensor in tensors.items()}, config, owner)


def write_adapter(adapter: AdapterState, folder: Path) -> None:
    """Writes a plain PEFT folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in adapter.tensors.items()}
    tensors |= {name: tensor.clone() for name, tensor in tensors.items() if name.endswith(ROWS)}  # some are shared
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    adapter.owner.write(folder)
    adapter.config.save_pretrained(str(folder))


def saved_in_full(model: Any) -> list[str]:
    """Full names, in the base, of the modules that the adapter trains in full."""
    from peft.utils import ModulesToSaveWrapper

    prefix = "base_model.model."
    return [
        name.removeprefix(prefix) for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)
    ]


def in_fp32(model: Any) -> Any:
    """Casts every trainable weight to fp32: a master that loses no small update."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32)
    return model


def linear_names(model: nn.Module) -> list[str]:
    """Full names of the modules that LoRA can wrap, the output head among them."""
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D, *package_layers())
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def target_modules(base: Base, adapter: Adapter) -> str | list[str]:
    """The recipe's targets for PEFT, every one of which matches a linear module, none of a head.

    all-linear and names go through as they are, since servers read them. A regular expression becomes the names it
    matches (PEFT would match it against every module, and stop at the first that is not linear), and so does
    everything where `layers` narrows it (PEFT refuses layers beside all-linear), and all-linear on a GPTQ or AWQ base
    (PEFT would pass over its layers) or one with a head (PEFT would wrap some of it, and knows few of its names).
    """
    model = base.model
    targets, names = adapter.target_modules, [name for name in linear_names(model) if name not in base.head]
    if targets != "all-linear":
        targets = [targets] if isinstance(targets, str) else targets
        chosen = [name for target in targets for name in _matched(target, names, len(targets) == 1)]
        if any(not any(_is_suffix(target, name) for name in names) for target in targets):
            targets = chosen
    else:
        chosen = [name for name in names if model.get_submodule(name) is not model.get_output_embeddings()]
    if adapter.layers is None:
        by_name = bool(base.head.modules) or any(isinstance(module, package_layers()) for module in model.modules())
        return chosen if targets == "all-linear" and by_name else targets
    known = {index for name in names if (index := _layer_of(name)) is not None}
    for layer in adapter.layers:
        if layer not in known:
            raise UserError("adapter.layers", f"no layer {layer}", f"choose from {min(known)} to {max(known)}")
    return [name for name in chosen if _layer_of(name) in adapter.layers]


def _matched(target: str, names: list[str], may_be_regex: bool) -> list[str]:
    """The names that end in `target`, or that it matches in full as a regular expression."""
    where = "adapter.target_modules"
    found = [name for name in names if _is_suffix(target, name)]
    if not found and may_be_regex:
        found = [name for name in names if _compiled(target, where).fullmatch(name)]
    if not found:
        raise _no_match(where, target, names)
    return found


def _layer_of(name: str) -> int | None:
    """The first number in a module's name: the index of its layer."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def check_patterns(model: Any, adapter: Adapter) -> None:
    """Refuses a rank or alpha pattern, or a module to save, that touches nothing."""
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    for key, patterns in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        for pattern in patterns:
            where = f"adapter.{key}"
            if not any(_compiled(rf"(?:.*\.)?(?:{pattern})", where).fullmatch(name) for name in adapted):
                raise _no_match(where, pattern, adapted)
    modules = [name for name, _ in model.named_modules() if not _PEFT_S.search(name)]
    for wanted in adapter.modules_to_save:
        if not any(_is_suffix(wanted, name) for name in modules):
            raise _no_match("adapter.modules_to_save", wanted, modules)


def check_config(model: Any, config: Any, added_ids: Sequence[int] = ()) -> None:
    """Refuses a LoraConfig, of the recipe or of an adapter folder, that PEFT would compute wrongly on this base.

    added_ids: of the tokens whose rows it has to train.
    """
    check_tokens(model, config, added_ids)
    targets = [] if isinstance(config.target_modules, str) else list(config.target_modules)
    refuse_tied(model, [*(config.modules_to_save or []), *targets])
    quantized = quantized_modules(model)
    for wanted in config.modules_to_save or []:
        if found := [module for name, module in quantized.items() if _is_suffix(wanted, name)]:
            embedding = isinstance(found[0], nn.Embedding)
            raise UserError(
                "adapter.modules_to_save",
                f"{wanted} is quantised, and what is trained in full must not be",
                "set quantization.embeddings: none" if embedding else f"add {wanted} to quantization.skip_modules",
            )
    if config.use_dora and any(isinstance(module, Streamed) for module in model.modules()):
        what = "`lean` streams the layers, which PEFT's DoRA reads by itself"
        raise UserError("training.memory", what, "use offload", Exit.REFUSED)
    odd = [name for name, module in quantized_linear(model).items() if not reads_plainly(module)]
    if config.use_dora and odd:
        raise UserError(
            "adapter.use_dora",
            f"PEFT's DoRA dequantises the base by itself, and would read {odd[0]} wrongly",
            "use nf4 with rows of whole blocks, quantization.data_type: none, or plain LoRA",
            Exit.REFUSED,
        )


def refuse_tied(model: Any, names: list[str]) -> None:
    """Refuses to train a tied weight under a name by which the model does not use it, or uses it with others.

    The head and a decoder's embedding may be trained: they then differ, and a merge gives each a tensor of its own.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    shared = Counter(map(id, named.values()))
    tied = [name.rpartition(".")[0] for name, parameter in named.items() if shared[id(parameter)] > 1]
    apart = {id(model.get_output_embeddings())}
    if not getattr(model.config, "is_encoder_decoder", False):
        apart.add(id(model.get_input_embeddings()))
    for name in names:
        found = [module for module in tied if _is_suffix(name, module)]
        if any(id(model.get_submodule(module)) not in apart for module in found):
            raise UserError(
                "adapter",
                f"{name} shares its weight with the embedding (tie_word_embeddings); training it is not available yet",
                "leave it out of target_modules and modules_to_save",
            )


def _is_suffix(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(where, f"{pattern!r} is no regular expression: {error}", "mend the pattern") from error


def _no_match(where: str, target: str, names: list[str]) -> UserError:
    """What would match: the last parts of the names, each once."""
    known = sorted({last for name in names if name and not (last := name.rsplit(".", 1)[-1]).isdigit()})
    near = get_close_matches(target, known, 1)
    todo = f"perhaps {near[0]}? Possible are {', '.join(known)}" if near else f"choose from {', '.join(known)}"
    return UserError(where, f"{target!r} matches no module", todo)
