"""Names of a checkpoint's tensors in the live model, which has other ones where it is of another class or age."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def key_mapping(model: Any) -> dict[str, str]:
    """What from_pretrained has to be told of names, a pattern to its replacement; mostly nothing.

    Some decoders with a span head (transformers 5.23: LlamaForQuestionAnswering and its kin) call the bare model by
    another name than every checkpoint of the architecture does, and would load with all of it random.
    """
    bare = getattr(model, model.base_model_prefix, None)
    published = getattr(type(bare), "base_model_prefix", "")
    return {rf"^{published}\.": f"{model.base_model_prefix}."} if published not in ("", model.base_model_prefix) else {}


def renamer(model: Any) -> Callable[[str], str | None]:
    """A function from a tensor's name in a checkpoint to its name in `model`; None where that has no such tensor.

    It renames as loading does (transformers 5.23, core_model_loading.convert_and_load_state_dict_in_model): a prefix
    more or less, a BERT of 2018 whose norms have a gamma. None too for a tensor that is converted on the way.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    known: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    known |= dict(model.named_buffers(remove_duplicate=False))
    mapping = get_model_conversion_mapping(model, key_mapping(model) or None)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]

    def live(name: str) -> str | None:
        for how in ((), ()), (renamings, converters):
            found, converted = rename_source_key(name, *map(list, how), model.base_model_prefix, known)
            if found in known and converted is None:
                return found
        return None

    return live


def live_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The checkpoint's names that `model` knows, to its own."""
    live = renamer(model)
    return {name: found for name in names if (found := live(name)) is not None}
