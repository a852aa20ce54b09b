"""What a plan reads: the model's config.json, and the training rows where they cost little or are asked for."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from qlora_cli.data.readers import DataFile
from qlora_cli.data.sources import resolve
from qlora_cli.data.statistics import statistics
from qlora_cli.errors import UserError
from qlora_cli.model.base import Found, load_config
from qlora_cli.model.checks import check_start_token
from qlora_cli.model.heads import set_padding
from qlora_cli.model.prequantized import refuse_start, refuse_storage_keys
from qlora_cli.model.source import check_config, download, locate, read_config
from qlora_cli.model.tokenizer import load_tokenizer, stop_token_ids
from qlora_cli.plan.preview import from_here, load
from qlora_cli.plan.run_length import Rows
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.remote import is_local
from qlora_cli.recipe.schema import Model
from qlora_cli.train.reading import order_of
from qlora_cli.train.report import Report

CHEAP_BYTES = 16 << 20
"""Files of rows that are prepared without being asked for, together."""


VOCABULARIES = ("tokenizer.json", "vocab*", "merges.txt", "*.model", "*.tiktoken")
"""Files of which a tokenizer has one at least, if it has any: those of bytes have none, and load without."""


def config_of(recipe: Recipe) -> tuple[Path, Any]:
    """The folder with the model's config.json, of a hub model downloaded alone, and transformers' config.

    Raises UserError where it cannot be had, and for a recipe that cannot stand on this base.
    """
    folder = config_folder(recipe.model)
    stored = read_config(folder)
    refuse_storage_keys(recipe.quantization, stored, folder)
    refuse_start(recipe.adapter, stored, folder)
    return folder, load_config(folder, recipe.model)


def config_folder(model: Model) -> Path:
    """As model.source.locate, of a folder that needs no weights."""
    name = model.name_or_path
    if os.path.isdir(name) and model.revision is None:
        check_config(Path(name))
        return Path(name)
    if os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        return locate(model)  # which says what is wrong
    try:
        folder = download(model, ["config.json"])
    except UserError as error:
        todo = "check the name and the network, run `hf auth login` for a gated model, or name a folder here: a plan"
        raise UserError(error.where, error.what, f"{todo} needs its config.json alone") from error
    check_config(folder)
    return folder


def rows_of(recipe: Recipe, base: tuple[Path, Any], wanted: bool | None, report: Report) -> tuple[Rows | None, str]:
    """The training rows in numbers, or None and why they are not known.

    base: what `config_of` gave. wanted: True prepares them whatever it takes, and raises UserError for what is wrong
    with them; False never; None where they are in small files here, beside a tokenizer.
    """
    if wanted is False:
        return None, "--no-rows"
    if recipe.data.train[0].streaming:
        return None, "they are streamed"
    if wanted:
        folder, config = base
        if not os.path.isdir(recipe.model.name_or_path):
            folder = locate(recipe.model)  # with the tokenizer: of a hub model there is the config alone so far
        return counted(recipe, read_by(recipe, folder, config), report), ""
    try:
        if reason := why_costly(recipe):
            return None, f"{reason}; --rows reads them"
        return counted(recipe, read_by(recipe, *base), report), ""
    except UserError as error:
        return None, f"{from_here(error.where)}: {error.what}"


def read_by(recipe: Recipe, folder: Path, config: Any) -> Found:
    """As model.base.find_base, of a folder that needs no weights."""
    config = copy.deepcopy(config)
    try:
        tokenizer = load_tokenizer(folder, recipe.model)
    except UserError as error:
        if any(path for pattern in VOCABULARIES for path in folder.glob(pattern)):
            raise
        todo = "put the tokenizer's files into the model folder, or plan with --no-rows"
        raise UserError(folder, "no tokenizer beside config.json", todo) from error
    set_padding(config, tokenizer, recipe.model.task)
    check_start_token(config, recipe.model.task)
    return Found(folder, tokenizer, stop_token_ids(folder, tokenizer), config, recipe.model.task)


def why_costly(recipe: Recipe) -> str:
    """Why the rows are not simply read; empty where they are small files here. Raises UserError for missing ones."""
    num_bytes = 0
    for source in recipe.data.train:
        if not is_local(source.path):
            return f"{source.path} may have to be downloaded"
        files = [part for part in resolve(source, "train").parts if isinstance(part, DataFile)]
        num_bytes += sum(os.path.getsize(file.path) for file in files)
    return "" if num_bytes <= CHEAP_BYTES else f"{num_bytes / 1e6:,.0f} MB take their time"


def counted(recipe: Recipe, found: Found, report: Report) -> Rows:
    """The prepared rows in numbers. Raises UserError for what is wrong with them."""
    training = recipe.training
    examples = load(recipe, found, "train", report)
    order = order_of(recipe, examples, training.micro_batch_size * training.gradient_accumulation_steps)
    told = statistics(examples, recipe, order)
    assert told.epoch is not None, "these are training rows"
    epoch = told.epoch
    return Rows(epoch.num_examples, epoch.num_tokens, told.lengths.most, epoch.total_steps)
