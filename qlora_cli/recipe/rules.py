"""Keys that are legal alone and make no sense together: one small function per rule, all of them tried.

A rule looks at values, never at which keys were written: `resolved.yaml` writes every key and must load again.
So "given" means: not the default.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator

from qlora_cli.recipe.fields import fields
from qlora_cli.recipe.located_yaml import show
from qlora_cli.recipe.problems import Problem
from qlora_cli.recipe.remote import is_local
from qlora_cli.recipe.schema import Adapter, LoftQ, Recipe, Source
from qlora_cli.recipe.suite_rules import SUITE_RULES, measured_sources
from qlora_cli.recipe.task_rules import TASK_RULES
from qlora_cli.recipe.values import given, no_effect, plain

Rule = Callable[[Recipe], Iterator[Problem]]

STORES_ITS_BASE = ("loftq", "pissa", "olora")
"""Values of adapter.init that change the base, which is stored in blocks."""


def length_limits_come_in_pairs(recipe: Recipe) -> Iterator[Problem]:
    """`data.source_max_length` and `target_max_length` are given both or not at all."""
    data = recipe.data
    if (data.source_max_length is None) == (data.target_max_length is None):
        return
    given, absent = "source_max_length", "target_max_length"
    if data.source_max_length is None:
        given, absent = absent, given
    todo = f"Set both, or use `data.max_length` for the whole example instead of `{given}`"
    yield Problem(("data", given), f"`{given}: {getattr(data, given)}` without `{absent}`", todo)


def no_folder_called_tilde(recipe: Recipe) -> Iterator[Problem]:
    """`~` in `output_dir`, `model.name_or_path` and `adapter.from` is the shell's: a recipe does not expand it."""
    paths = {
        ("output_dir",): recipe.output_dir,
        ("model", "name_or_path"): recipe.model.name_or_path,
        ("adapter", "from"): recipe.adapter.from_,
    }
    for place, path in paths.items():
        if path is not None and path.startswith("~"):
            yield Problem(place, f"`~` is not expanded in {show(path)}", "Write the whole path")


def one_kind_of_length_limit(recipe: Recipe) -> Iterator[Problem]:
    """`data.max_length` is not given beside `source_max_length` and `target_max_length`."""
    data = recipe.data
    if data.source_max_length is not None and data.target_max_length is not None and given(data, "max_length"):
        what = f"`max_length: {data.max_length}` beside `source_max_length` and `target_max_length`"
        yield Problem(("data", "max_length"), what, "Keep the one limit or the pair")


def block_settings_need_blocks(recipe: Recipe) -> Iterator[Problem]:
    """`quantization.block_size` and `double_quant` are for blocks: int8 keeps one scale per row, none has no scales."""
    quantization = recipe.quantization
    in_blocks = quantization.overrides or quantization.embeddings != "none"
    in_blocks = in_blocks or (quantization.data_type == "int8" and recipe.adapter.init in STORES_ITS_BASE)
    if quantization.data_type in ("int8", "none") and not in_blocks:
        for name in ("double_quant", "block_size"):
            yield from no_effect(recipe, "quantization", name, f"with `data_type: {quantization.data_type}`")


def nothing_is_skipped_where_nothing_is_quantised(recipe: Recipe) -> Iterator[Problem]:
    """`quantization.skip_modules` needs a data type to skip."""
    if recipe.quantization.data_type == "none" and not recipe.quantization.overrides:
        yield from no_effect(recipe, "quantization", "skip_modules", "with `data_type: none`")


def what_is_mixed_is_in_blocks(recipe: Recipe) -> Iterator[Problem]:
    """`quantization.overrides` and `embeddings` mix types in blocks: not `int8`, whose product is another one; and
    overrides are not none alone."""
    quantization = recipe.quantization
    if quantization.overrides and {quantization.data_type, *quantization.overrides.values()} == {"none"}:
        what = "`overrides` that are none, as `data_type` is: nothing is quantised"
        yield Problem(("quantization", "overrides"), what, "Delete them, or name a data type")
    if quantization.data_type == "int8" and quantization.overrides:
        what = "`overrides` beside `data_type: int8`, which cannot be mixed"
        yield Problem(("quantization", "overrides"), what, "Use nf4, fp4, int4, nf2, int2 or none as data_type")
    if quantization.data_type == "int8" and quantization.embeddings != "none":
        what = f"`embeddings: {quantization.embeddings}` beside `data_type: int8`, which cannot be mixed"
        yield Problem(("quantization", "embeddings"), what, "Use nf4, fp4, int4, nf2, int2 or none as data_type")


def ranges_need_uniform_levels(recipe: Recipe) -> Iterator[Problem]:
    """`quantization.zero_point` and `clip` are for int4 and int2."""
    quantization = recipe.quantization
    kinds = {quantization.data_type, quantization.embeddings, *quantization.overrides.values()}
    if not kinds & {"int4", "int2"}:
        for name in ("zero_point", "clip"):
            yield from no_effect(recipe, "quantization", name, f"with `data_type: {quantization.data_type}`")


def outliers_need_int8(recipe: Recipe) -> Iterator[Problem]:
    """`quantization.outlier_threshold` is for `data_type: int8` alone, where the base is not stored in blocks."""
    started = recipe.adapter.init in STORES_ITS_BASE
    if recipe.quantization.data_type != "int8" or started:
        cause = f"init: {recipe.adapter.init}" if started else f"data_type: {recipe.quantization.data_type}"
        yield from no_effect(recipe, "quantization", "outlier_threshold", f"with `{cause}`")


def a_continued_adapter_keeps_its_shape(recipe: Recipe) -> Iterator[Problem]:
    """`adapter.from` stands alone: the continued adapter's own adapter_config.json says what it is."""
    if recipe.adapter.from_ is None:
        return
    for name in fields(Adapter):
        if name != "from" and given(recipe.adapter, name):
            what = f"`{name}: {show(plain(recipe.adapter, name))}` beside `from: {recipe.adapter.from_}`"
            todo = f"Delete `{name}`: a continued adapter brings its own, or delete `from` to start anew"
            yield Problem(("adapter", name), what, todo)


def lean_streams_what_we_read(recipe: Recipe) -> Iterator[Problem]:
    """`training.memory: lean` is not for `int8`, whose layers bitsandbytes reads, nor for DoRA, which PEFT reads."""
    if recipe.training.memory != "lean":
        return
    todo = "Use `memory: offload`, which leaves the layers on the GPU"
    if recipe.quantization.data_type == "int8" and recipe.adapter.init not in STORES_ITS_BASE:
        what = "`memory: lean` beside `quantization.data_type: int8`, whose layers cannot be streamed"
        yield Problem(("training", "memory"), what, f"{todo}, or another data type")
    if recipe.adapter.use_dora:
        what = "`memory: lean` beside `adapter.use_dora`, for which PEFT reads the layers by itself"
        yield Problem(("training", "memory"), what, todo)


def an_added_token_has_a_row_to_train(recipe: Recipe) -> Iterator[Problem]:
    """`model.added_tokens` names each token once, and needs `quantization.embeddings: none`: their rows are trained."""
    tokens, place = recipe.model.added_tokens, ("model", "added_tokens")
    if twice := next((token for token in tokens if tokens.count(token) > 1), None):
        yield Problem(place, f"{show(twice)} is named twice", "Name each token once")
    if tokens and recipe.quantization.embeddings != "none":
        what = f"`added_tokens` with `embeddings: {recipe.quantization.embeddings}`, and their rows are trained"
        yield Problem(place, what, "Set `quantization.embeddings: none`")


def dora_cannot_read_int8(recipe: Recipe) -> Iterator[Problem]:
    """`adapter.use_dora` is not for `data_type: int8`: PEFT loses the row scales after the first forward pass."""
    if recipe.adapter.use_dora and recipe.quantization.data_type == "int8":
        what = "`use_dora: true` with `data_type: int8` is not available yet"
        yield Problem(("adapter", "use_dora"), what, "Use nf4, fp4 or none, or plain LoRA")


def loftq_settings_need_loftq(recipe: Recipe) -> Iterator[Problem]:
    """`adapter.loftq` is for `init: loftq` alone."""
    adapter = recipe.adapter
    if adapter.from_ is None and adapter.init != "loftq":
        for name in fields(LoftQ):
            if given(adapter.loftq, name):
                what = f"`{name}: {getattr(adapter.loftq, name)}` has no effect with `init: {adapter.init}`"
                yield Problem(("adapter", "loftq", name), what, "Set `adapter.init: loftq` or delete it")


def a_start_that_changes_the_base_can_store_it(recipe: Recipe) -> Iterator[Problem]:
    """`adapter.init` loftq, pissa and olora store the base in packed layers, which DoRA cannot read; and
    LoftQ needs something that is quantised. `loftq.calibration` needs rows that do not stream."""
    adapter, kind = recipe.adapter, recipe.quantization.data_type
    if adapter.init not in STORES_ITS_BASE:
        return
    place = ("adapter", "init")
    if adapter.use_dora:
        yield Problem(place, f"`init: {adapter.init}` with `use_dora: true` is not available yet", "Use plain LoRA")
    if adapter.init == "loftq" and kind == "none" and not recipe.quantization.overrides:
        yield Problem(place, "`init: loftq` with `data_type: none`: nothing is lost", "Name a data type, or use pissa")
    if adapter.loftq.calibration and any(source.streaming for source in recipe.data.train):
        what = f"`calibration: {adapter.loftq.calibration}` with `streaming: true` is not available yet"
        yield Problem(("adapter", "loftq", "calibration"), what, "Delete one of the two")


def one_kind_of_warmup(recipe: Recipe) -> Iterator[Problem]:
    """Warmup is given as `training.warmup_steps` or as `warmup_ratio`."""
    training = recipe.training
    if training.warmup_steps is not None and given(training, "warmup_ratio"):
        what = f"`warmup_ratio: {training.warmup_ratio}` beside `warmup_steps: {training.warmup_steps}`"
        yield Problem(("training", "warmup_ratio"), what, "Keep one of the two")


def a_constant_schedule_has_no_floor(recipe: Recipe) -> Iterator[Problem]:
    """`training.min_lr_ratio` is for a schedule that falls, not for `lr_scheduler: constant`."""
    if recipe.training.lr_scheduler == "constant":
        yield from no_effect(recipe, "training", "min_lr_ratio", "with `lr_scheduler: constant`")


def one_kind_of_held_out_data(recipe: Recipe) -> Iterator[Problem]:
    """Held-out data is named in `data.eval` or taken off by `eval_fraction`."""
    if recipe.data.eval and recipe.data.eval_fraction:
        what = f"`eval_fraction: {recipe.data.eval_fraction}` beside `eval`"
        yield Problem(("data", "eval_fraction"), what, "Keep one of the two")


def nothing_is_measured_without_held_out_data(recipe: Recipe) -> Iterator[Problem]:
    """`training.eval_steps` needs held-out data, `data.eval` or `eval_fraction`, or a suite that runs in training."""
    if not recipe.data.eval and not recipe.data.eval_fraction and not recipe.evaluation.during_training:
        yield from no_effect(recipe, "training", "eval_steps", "without `data.eval` or `data.eval_fraction`")


def weights_are_for_training(recipe: Recipe) -> Iterator[Problem]:
    """`weight` is for the sources of `data.train`: held-out rows, and those of a suite, are measured once each."""
    for place, source in measured_sources(recipe):
        if given(source, "weight"):
            what = f"`weight: {source.weight:g}` has no effect on held-out data"
            yield Problem((*place, "weight"), what, "Delete it")


def a_stream_has_no_end(recipe: Recipe) -> Iterator[Problem]:
    """`streaming` is for all sources of `data.train` or for none; it needs `training.max_steps`, and held-out rows of
    their own. A source of `data.eval`, or of a suite, with it is a data set of the hub and needs `limit`."""
    streaming = [source.streaming for source in recipe.data.train]
    place = ("data", "train", streaming.index(True), "streaming") if any(streaming) else ()
    if any(streaming) and not all(streaming):
        yield Problem(place, "`streaming: true` beside a source without it", "Set it for all of `data.train`, or none")
    if any(streaming) and recipe.training.max_steps is None:
        yield Problem(place, "`streaming: true` without `training.max_steps`", "Set it: nobody knows the last row")
    if any(streaming) and recipe.data.eval_fraction:
        yield Problem(place, "`streaming: true` beside `data.eval_fraction`", "Name held-out rows in `data.eval`")
    for where, source in measured_sources(recipe):
        if source.streaming and source.limit is None:
            todo = "Set `limit`: held-out rows are all kept"
            yield Problem((*where, "streaming"), "`streaming: true` without `limit`", todo)
        elif source.streaming and is_local(source.path):
            what = "`streaming: true` has no effect on held-out files, which are read up to `limit`"
            yield Problem((*where, "streaming"), what, "Delete it")


def a_template_is_the_format(recipe: Recipe) -> Iterator[Problem]:
    """A source's rows are read by its `template` or by its `format`."""
    trained = ((("data", "train", index), source) for index, source in enumerate(recipe.data.train))
    for place, source in (*trained, *measured_sources(recipe)):
        if source.template is not None and source.format != "auto":
            yield Problem((*place, "format"), f"`format: {source.format}` beside `template`", "Keep one of the two")


def the_chat_template_keeps_its_own_names(recipe: Recipe) -> Iterator[Problem]:
    """`data.chat_template_kwargs` does not hold what every chat template is given: messages, tools, ..."""
    for name in recipe.data.chat_template_kwargs:
        if name in TEMPLATE_NAMES or name.endswith("_token"):
            what = f"`{name}` is given to every chat template by us"
            yield Problem(("data", "chat_template_kwargs", name), what, "Delete it")


TEMPLATE_NAMES = ("messages", "tools", "documents", "add_generation_prompt")


def held_out_data_is_not_trained_on(recipe: Recipe) -> Iterator[Problem]:
    """What is in `data.eval`, or in a suite, is not in `data.train`: the same file, or the same split of the hub."""
    trained = {_rows_of(source, "train"): index for index, source in enumerate(recipe.data.train)}
    for place, source in measured_sources(recipe):
        rows = _rows_of(source, "held-out")
        if rows in trained:
            what = f"{show(source.path)} is held out here and trained on in `data.train[{trained[rows]}]`"
            todo = "Name another file or split: a model that has seen the answers cannot be measured on them"
            yield Problem((*place, "path"), what, todo)


def layers_are_compiled_or_ligers(recipe: Recipe) -> Iterator[Problem]:
    """`training.torch_compile` compiles norms and MLPs itself: not beside `layer_kernels: liger`."""
    if recipe.training.torch_compile and recipe.training.layer_kernels == "liger":
        what = "`layer_kernels: liger` beside `torch_compile: true`, which compiles the same"
        yield Problem(("training", "layer_kernels"), what, "Keep one of the two")


RULES: tuple[Rule, ...] = (
    length_limits_come_in_pairs,
    no_folder_called_tilde,
    one_kind_of_length_limit,
    block_settings_need_blocks,
    what_is_mixed_is_in_blocks,
    ranges_need_uniform_levels,
    nothing_is_skipped_where_nothing_is_quantised,
    outliers_need_int8,
    a_continued_adapter_keeps_its_shape,
    an_added_token_has_a_row_to_train,
    dora_cannot_read_int8,
    lean_streams_what_we_read,
    loftq_settings_need_loftq,
    a_start_that_changes_the_base_can_store_it,
    one_kind_of_warmup,
    layers_are_compiled_or_ligers,
    a_constant_schedule_has_no_floor,
    one_kind_of_held_out_data,
    held_out_data_is_not_trained_on,
    nothing_is_measured_without_held_out_data,
    weights_are_for_training,
    a_stream_has_no_end,
    a_template_is_the_format,
    the_chat_template_keeps_its_own_names,
    *TASK_RULES,
    *SUITE_RULES,
)


def broken_rules(recipe: Recipe) -> Iterator[Problem]:
    """What every rule has against the recipe."""
    for rule in RULES:
        yield from rule(recipe)


def _rows_of(source: Source, role: str) -> tuple[str, str | None, str]:
    """What tells one source's rows from another's. A file has no splits, a hub data set's depends on its use."""
    if is_local(source.path):
        path = os.path.realpath(os.path.expanduser(source.path))
        return path, None, (source.split or "") if os.path.isdir(path) or glob.has_magic(path) else ""
    return source.path, source.name, source.split or role
