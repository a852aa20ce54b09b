"""Tokens that a recipe adds: rows of the embedding, and of a head of its own, that are trained beside the adapter.

The base gets a row for each, the mean of the rows before; PEFT trains them (`trainable_token_indices`) and stores their
values. PEFT's layer copies the whole table in every forward pass, and its backward has a gradient of all of it: here
the frozen table is read as it is, and the few rows are put into what comes out of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from qlora_cli.errors import UserError

PORTION = 4096
"""Rows of a table at once in fp64."""

KEY = "model.added_tokens"

ROWS = ".token_adapter.trainable_tokens_delta"
"""How the names of trained rows in an adapter's file end."""


def ids_of(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
    """The ids of tokens that the tokenizer has."""
    return tuple(tokenizer.convert_tokens_to_ids(list(tokens))) if tokens else ()


def make_room(model: Any, ids: Sequence[int]) -> None:
    """Gives each id a row in the embedding and in a head: the mean of all rows before the first id, in their dtype.

    The same at every load: nothing is drawn, and sums are fp64. A table that has the rows already keeps its size.
    Raises UserError for a table that is quantised, and a head with a bias, which PEFT's rows leave out.
    """
    for name, table in tables(model).items():
        weight = getattr(table, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            todo = f"add {name} to quantization.skip_modules, and set quantization.embeddings: none"
            raise UserError(KEY, f"{name} is quantised, and has to get rows that are trained", todo)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        what = "the head has a bias, which PEFT leaves out where it trains rows"
        raise UserError(KEY, what, f"leave the tokens out: {type(model).__name__} cannot have any yet")
    if max(ids) >= len(model.get_input_embeddings().weight):
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices), tied_as_loaded(model):  # it draws values, which are overwritten below
            model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    for table in tables(model).values():
        with torch.no_grad():
            table.weight[list(ids)] = mean_row(table.weight, min(ids)).to(table.weight.dtype)


@contextmanager
def tied_as_loaded(model: Any) -> Iterator[None]:
    """Inside the block transformers ties what it tied when it loaded, and no head that the checkpoint has of its own.

    The config of every T5 says that its head is tied: loading looks at the weights, resizing (5.23) does not, and would
    put the embedding in the place of T5 1.1's head.
    """
    model.tie_weights = partial(type(model).tie_weights, model, recompute_mapping=False)
    try:
        yield
    finally:
        del model.tie_weights


def tables(model: Any) -> dict[str, Any]:
    """The embedding, and the head where its weight is its own, by their full names."""
    own = model.get_input_embeddings()
    head = model.get_output_embeddings()
    found = [own] if head is None or getattr(head, "weight", None) is own.weight else [own, head]
    return {next(name for name, module in model.named_modules() if module is one): one for one in found}


def mean_row(table: Tensor, number: int) -> Tensor:
    """The mean of the first `number` rows, (d,) float64."""
    sums = [table[begin : min(begin + PORTION, number)].double().sum(0) for begin in range(0, number, PORTION)]
    return torch.stack(sums).sum(0) / number


def token_indices(model: Any, ids: Sequence[int]) -> dict[str, list[int]] | None:
    """PEFT's `trainable_token_indices` for a base; None without ids.

    Of a table that the config calls tied PEFT lets the head and others follow the embedding; of other tables each name
    is listed, such as those of the two sides of a BART that classifies.
    """
    from peft.utils.other import _get_module_names_tied_with_embedding

    if not ids:
        return None
    tied = getattr(model.config, "tie_word_embeddings", False)
    follow = set(_get_module_names_tied_with_embedding(model)) if tied else set()
    return {name: list(ids) for name in [*tables(model), *_sharing(model)] if name not in follow}


def check_tokens(model: Any, config: Any, ids: Sequence[int]) -> None:
    """Refuses a LoraConfig that does not train the ids, trains rows that the base lacks, or changes a table twice."""
    wanted = getattr(config, "trainable_token_indices", None)
    if not wanted:
        if ids:
            what = f"names {len(ids)} tokens, and the adapter has no rows for them"
            raise UserError(KEY, what, "leave it out, or name an adapter that was trained with it")
        return
    listed = list(wanted.values()) if isinstance(wanted, dict) else [wanted]
    number = len(model.get_input_embeddings().weight)
    if (most := max(max(one) for one in listed)) >= number:
        what = f"the adapter trains token {most}, and the base has {number:,} rows"
        raise UserError(KEY, what, "add the tokens that it was trained with, in their order")
    if any(not set(ids) <= set(one) for one in listed):
        what = f"its tokens are {list(ids)}, and the adapter trains {sorted({one for ids in listed for one in ids})}"
        raise UserError(KEY, what, "add the tokens that it was trained with, in their order")
    targets = [] if isinstance(config.target_modules, str) else list(config.target_modules)
    for name in [*tables(model), *_sharing(model)]:
        if found := [one for one in [*(config.modules_to_save or []), *targets] if f".{name}".endswith(f".{one}")]:
            what = f"trains rows of {name}, and adapter.target_modules or modules_to_save changes it too ({found[0]})"
            raise UserError(KEY, what, f"leave {found[0]} out")


def use_rows(model: Any, device: torch.device) -> None:
    """Gives PEFT's layers of trained rows the forward of this file, and their rows the device of the base.

    Those of one table get the same rows. Raises UserError where PEFT wraps only some, or their rows differ.
    """
    kind: Any = _peft_layer()
    layers = [module for module in model.modules() if type(module) is kind]
    if layers and (bare := next(iter(_sharing(model.get_base_model())), None)):
        what = f"{bare} shares its weight with the embedding, and does not follow the rows that are trained"
        raise UserError(KEY, what, "name an adapter that was trained with model.added_tokens")
    first: dict[int, Any] = {}
    for layer in layers:
        layer.__class__ = _fused(kind)
        own = layer.trainable_tokens_delta
        rows = first.setdefault(id(layer.base_layer.weight), own)
        if not all(row.is_meta or torch.equal(row, own[name]) for name, row in rows.items()):
            what = "the adapter has other rows for the head, or for a second name of the embedding, than for its first"
            raise UserError(KEY, what, "name an adapter that was trained with model.added_tokens")
        layer.trainable_tokens_delta = rows
    for row in (row for rows in first.values() for row in rows.values() if device.type != "meta"):
        row.data = row.data.to(device)


def _sharing(model: Any) -> Iterator[str]:
    """Full names of modules with the embedding's weight, other than its own and those whose rows PEFT trains."""
    own = model.get_input_embeddings()
    table, first = getattr(own, "original_module", own), next(name for name, one in model.named_modules() if one is own)
    place = ".token_adapter.base_layer"
    for name, module in model.named_modules(remove_duplicate=False):  # transformers may have one module in three places
        if name == first or name.endswith(place) or not isinstance(module, nn.Embedding | nn.Linear):
            continue
        if module.weight is table.weight:
            yield name


class Rows(nn.Module):
    """Stands before PEFT's layer of trained rows and replaces its forward; it has no parameters of its own."""

    def forward_adapters(self, x: Tensor, active_adapters: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Of an embedding ids (...) to (..., d), of a head (..., d) to (..., V), as PEFT computes them."""
        layer: Any = self
        base, active = layer.base_layer, list(active_adapters or ())
        off = layer.disable_adapters or layer.merged or len(active) != 1
        if off or args or kwargs or not _is_plain(base):
            whole: Tensor = super().forward_adapters(x, active_adapters, *args, **kwargs)  # type: ignore[misc]
            return whole
        rows, ids = layer.trainable_tokens_delta[active[0]], layer.token_indices[active[0]]
        found: Tensor = base(x)
        if isinstance(base, nn.Embedding):
            values = self.looked_up(rows, ids, x).to(found.dtype)
            scale = layer._get_embed_scale()
            values = values if scale is None else values * scale.to(values.dtype)
            return torch.where(self.place(ids, x.device)[x].unsqueeze(-1) >= 0, values, found)
        values = linear(x, rows.to(base.weight.dtype))
        return found.index_copy_(-1, self.index(ids, x.device), values)

    def looked_up(self, rows: Tensor, ids: Sequence[int], x: Tensor) -> Tensor:
        """The trained row of each id of x; of any other id the first of them."""
        return embedding(self.place(ids, x.device)[x].clamp(min=0), rows)

    def place(self, ids: Sequence[int], device: torch.device) -> Tensor:
        """(num_embeddings,) int64: which of the trained rows is that of an id, -1 for none."""
        layer: Any = self
        known = self.__dict__.setdefault("places", {})
        if (device, *ids) not in known:
            place = torch.full((layer.base_layer.num_embeddings,), -1)
            place[list(ids)] = torch.arange(len(ids))
            known[(device, *ids)] = place.to(device)
        found: Tensor = known[(device, *ids)]
        return found

    def index(self, ids: Sequence[int], device: torch.device) -> Tensor:
        """(n,) int64: the ids."""
        known = self.__dict__.setdefault("indices", {})
        if (device, *ids) not in known:
            known[(device, *ids)] = torch.tensor(list(ids), device=device)
        found: Tensor = known[(device, *ids)]
        return found


def _is_plain(base: Any) -> bool:
    """Whether a table looks up or multiplies and does nothing else."""
    if isinstance(base, nn.Embedding):
        return base.max_norm is None and not base.sparse and not base.scale_grad_by_freq
    return isinstance(base, nn.Linear) and base.bias is None


def trained_rows(indices: Any, module: str, embeddings: Iterable[str]) -> list[int] | None:
    """The ids whose rows of a module an adapter_config.json has trained, in the order of the rows; None for none.

    indices: its `trainable_token_indices`; a list is of the embedding, whose names are given.
    """
    if isinstance(indices, dict):
        return next((ids for name, ids in indices.items() if f".{module}".endswith(f".{name}")), None)
    return indices if module in embeddings else None


def _peft_layer() -> type:
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    return TrainableTokensLayer


@cache
def _fused(kind: type) -> type:
    return type(kind.__name__, (Rows, kind), {"__module__": kind.__module__})
