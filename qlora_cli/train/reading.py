"""What a run reads: prepared or streamed examples, fit for the model, and how they lie in its batches."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import date
from itertools import count as count_up
from itertools import islice

import numpy as np

from qlora_cli.data.examples import Examples, load_examples, wanted_rows
from qlora_cli.data.limits import Limits
from qlora_cli.data.order import Order, Rows
from qlora_cli.data.readers import DataFile
from qlora_cli.data.row_task import RowTask
from qlora_cli.data.rows import Role, count
from qlora_cli.data.sources import Part
from qlora_cli.data.statistics import layout_of
from qlora_cli.data.store import part_from_json
from qlora_cli.data.stream import BLOCK, Stream
from qlora_cli.errors import UserError
from qlora_cli.kernels.isolation import NotIsolated, check_isolation, prepare_packing
from qlora_cli.kernels.packed_attention import NAME as PACKED
from qlora_cli.model.base import Base, Found
from qlora_cli.model.rope import rope_boundaries
from qlora_cli.quant.layers import num_embeddings
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.schema import Source
from qlora_cli.train.feed import Feed, StoredFeed, StreamFeed
from qlora_cli.train.report import Report
from qlora_cli.train.run import Run, read_facts

TOLD_ROWS = 20
"""So many bad rows of a stream are told; all are counted."""


def open_feed(recipe: Recipe, base: Found, report: Report, today: date, units_per_step: int) -> Feed:
    """What is trained on: the rows of data.train, all of them prepared, or read and prepared while training."""
    data = recipe.data
    if not data.train[0].streaming:
        examples = encode_role(recipe, base, "train", report, today)
        return StoredFeed(examples, order_of(recipe, examples, units_per_step))
    seed, task = recipe.training.seed, RowTask.of(recipe)
    wanted = wanted_rows(data, "train", base.tokenizer, base.stop_token_ids, seed=seed, today=today, task=task)
    capacity = wanted.limits.longest if data.packing is True else None
    workers = None if data.workers == "auto" else data.workers

    told = islice(count_up(), TOLD_ROWS)

    def tell(error: UserError) -> None:
        if next(told, None) is not None:
            report.say(f"train    bad row left out: {error}")

    stream = Stream(wanted, units_per_step, recipe.training.seed, capacity, workers, tell)
    for source in data.train:
        report.say(f"train    {source.path}: read while training, weight {source.weight:g}")
    return StreamFeed(stream, wanted.limits.longest, stream.digest(), report.say)


def encode_role(recipe: Recipe, base: Found, role: Role, report: Report, today: date) -> Examples:
    """The encoded rows of data.train or data.eval, with what was read and left out told."""
    examples = load_role(recipe, base, role, report, today)
    for line in examples.summary() if examples.rows else []:
        report.say(f"{role:<8} {line}")
    return examples


def load_role(recipe: Recipe, base: Found, role: Role, report: Report, today: date) -> Examples:
    """The encoded rows of data.train or data.eval, with nothing told but how far it is; of streams the first block."""
    sources = [first_block(source) if source.streaming else source for source in recipe.data.train]
    return load_examples(
        recipe.data.model_copy(update={"train": sources}),
        role,
        base.tokenizer,
        base.stop_token_ids,
        seed=recipe.training.seed,
        today=today,
        task=RowTask.of(recipe),
        progress=lambda num_rows: report.prepared(role, num_rows),
    )


def first_block(source: Source) -> Source:
    """The first rows of a source that may never end."""
    return source.model_copy(update={"limit": min(source.limit or BLOCK, BLOCK)})


def order_of(recipe: Recipe, train_set: Examples, units_per_step: int) -> Order:
    """The order of the examples; with data.packing: true, of rows that they fill."""
    capacity = Limits.of(recipe.data, recipe.model.task).longest if recipe.data.packing is True else None
    sources = tuple((source.num_examples, source.weight) for source in train_set.sources)
    return Order(sources, units_per_step, recipe.training.seed, train_set.lengths, capacity)


def say_layout(report: Report, recipe: Recipe, feed: Feed, packed: bool) -> None:
    """How the examples of the first epoch lie in the batches, and what share of these is padding."""
    if isinstance(feed, StoredFeed):
        report.say(f"batches  {layout_of(feed.order, recipe.training.micro_batch_size).words(packed)}")


def refuse_trained_on(trained: Iterable[Part], eval_set: Examples) -> None:
    """Refuses held-out files and hub splits that are among the trained ones, however they were named."""
    refuse_parts(trained, eval_set.parts, "data.eval")


def refuse_parts(trained: Iterable[Part], measured: Iterable[Part], where: str) -> None:
    """The same of files and hub splits that nobody has read yet. where: the key that names them."""
    known = {identity(part) for part in trained}
    for part in measured:
        if identity(part) in known:
            what = f"{part.path} is held out and trained on"
            raise UserError(where, what, "name other rows: a model that has seen them cannot be measured on them")


def refuse_seen(recipe: Recipe, run: Run, eval_set: Examples) -> None:
    """Refuses rows that the finished run has seen: another share of its files than it held out is trained on."""
    data = (read_facts(run) or {}).get("data", {})
    split = {"eval_fraction": recipe.data.eval_fraction, "seed": recipe.training.seed}
    if not recipe.data.eval_fraction or split != data.get("split"):
        refuse_trained_on(map(part_from_json, data.get("parts", [])), eval_set)


def identity(part: Part) -> tuple[str | None, ...]:
    """What tells one part's rows from another's: the file, or the hub's split without a slice of it."""
    if isinstance(part, DataFile):
        return (os.path.realpath(part.path),)
    return part.path, part.name, part.split.partition("[")[0]


def refuse_beyond_context(found: Found, *sets: Examples) -> None:
    """Refuses rows of more tokens than the model has positions: it was never trained to read so far."""
    context = found.context
    for examples in sets:
        lengths = positions_of(examples)
        too_long = [index for index in range(len(lengths)) if context and lengths[index] > context]
        if too_long:
            windows = examples.task == "question_answering"  # which no row is too long for
            raise UserError(
                examples.rows[too_long[0]].where,
                f"the row takes {lengths[too_long[0]]:,} tokens, the model has {context:,} positions "
                f"({count(len(too_long), 'such row')})",
                f"set data.max_length: {context}" + ("" if windows else " and data.on_long_row to truncate or skip"),
            )


def positions_of(examples: Examples) -> Rows:
    """Positions that each example takes of a model: an encoder reads the source, a decoder the target."""
    lengths, trained = examples.lengths, examples.trained_lengths
    return np.maximum(lengths - trained, trained) if examples.task == "seq2seq_lm" else lengths


def refuse_long_stream(found: Found, feed: StreamFeed) -> None:
    """Refuses a stream whose limit lets rows of more tokens than the model has positions through."""
    context, longest = found.context, feed.stream.wanted.limits.most_positions
    if context and longest > context:
        what = f"lets streamed rows of {longest:,} tokens through, the model has {context:,} positions"
        raise UserError("data.max_length", what, f"set data.max_length: {context}")


def keep_apart(recipe: Recipe, base: Base, report: Report, longest: int) -> bool:
    """Whether examples can go through the model one behind the other: proven on the model itself.

    longest: tokens of the longest example. Raises UserError where data.packing asks for it and the model mixes them.
    """
    wanted, attention = recipe.data.packing, recipe.model.attn_implementation
    if wanted is False or recipe.model.task != "causal_lm":
        return False
    vocabulary = num_embeddings(base.model)
    try:
        if any(longest > boundary for boundary in rope_boundaries(base.config)):
            raise NotIsolated("one example beyond the length up to which its RoPE is short would lengthen all others'")
        with base.compute():
            if attention == "auto":
                attention = prepare_packing(base.model, base.device, vocabulary, longest)
            else:
                check_isolation(base.model, base.device, vocabulary, longest)
        if wanted == "auto" and not attention.startswith((PACKED, "flash")):
            raise NotIsolated(f"attention {attention} would pay for a mask over all rows of a batch at once")
    except NotIsolated as error:
        if wanted is True:
            todo = "set data.packing: false, or another model.attn_implementation"
            raise UserError("data.packing", f"this model cannot train packed rows: {error}", todo) from error
        report.say(f"note     padded batches, since this model does not keep packed rows apart: {error}")
        return False
    return True
