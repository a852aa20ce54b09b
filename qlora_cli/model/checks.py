"""What a load must not have done: left weights random or unquantised, or passed over a name of the recipe."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn

from qlora_cli.errors import Exit, UserError
from qlora_cli.model.heads import NO_HEAD, Head
from qlora_cli.quant.layers import quantized_linear, quantized_modules

SHARE_QUANTIZED = 0.9
"""At least this share of the weights that should be quantised must be, or loading is an error."""


def check_start_token(config: Any, task: str) -> None:
    """Refuses an encoder-decoder that is to write text and whose config does not say with which token it starts."""
    if task == "seq2seq_lm" and getattr(config, "decoder_start_token_id", None) is None:
        todo = "set it in config.json, as the model was trained"
        raise UserError("model.name_or_path", "the model's config has no decoder_start_token_id", todo)


def check_complete(folder: Path, info: dict[str, Any], head: Head = NO_HEAD) -> None:
    """Refuses a load that left weights random or of another shape, other than those of a new head."""
    absent = sorted(name for name in info["missing_keys"] if name not in head)
    odd = [
        f"{name}: {tuple(found)} in the file, {tuple(wanted)} in the model"
        for name, found, wanted in sorted(info["mismatched_keys"], key=str)
    ]
    if not absent and not odd:
        return
    named = ", ".join((odd + absent)[:5])
    raise UserError(
        folder,
        f"{len(absent) + len(odd)} weights would be random, not pretrained: {named}",
        "complete the checkpoint, or check that config.json belongs to it",
    )


def check_skipped(model: Any, skip_modules: list[str] | str) -> None:
    """Refuses a name in `skip_modules` that matches no module, and a list without a head that is tied.

    lm_head may match nothing, since not every model has a module of that name.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    for name, module in quantized_linear(model).items():
        if module is model.get_output_embeddings() and getattr(model.config, "tie_word_embeddings", False):
            raise UserError(
                "quantization.skip_modules",
                f"{name} shares its weight with the embedding, so it cannot be quantised",
                f"put {name} into the list",
            )
    names = [name for name, _ in model.named_modules() if name]
    for entry in [skip_modules] if isinstance(skip_modules, str) else skip_modules:
        if entry != "lm_head" and all(should_convert_module(name, [entry]) for name in names):
            known = sorted({name.rsplit(".", 1)[-1] for name in names if not name[-1].isdigit()})
            raise UserError(
                "quantization.skip_modules", f"{entry!r} matches no module", f"choose from {', '.join(known)}"
            )


def check_share_quantized(model: nn.Module, skip_modules: list[str] | str) -> None:
    """Refuses a model of whose quantisable weights less than 90% were quantised, and names what was left.

    Quantisable is every weight of two or more dimensions outside embeddings, `skip_modules` and norms.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = [skip_modules] if isinstance(skip_modules, str) else list(skip_modules)
    quantized = quantized_modules(model)
    done = sum(module.in_features * module.out_features for module in quantized_linear(model).values())
    left: Counter[str] = Counter()
    for name, module in model.named_modules():
        if name in quantized or isinstance(module, nn.Embedding) or not should_convert_module(name, skipped):
            continue
        left[name] += sum(p.numel() for p in module.parameters(recurse=False) if p.dim() >= 2)
    total = done + left.total()
    if total and done >= SHARE_QUANTIZED * total:
        return
    named = ", ".join(name or "(top)" for name, size in left.most_common(5) if size)
    raise UserError(
        "quantization.data_type",
        f"only {done / max(total, 1):.0%} of the weights that should be quantised are; left in full: {named or 'all'}",
        "this architecture cannot be quantised yet (fused experts?): use quantization.data_type: none",
        Exit.REFUSED,
    )
