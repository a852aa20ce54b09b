"""The finished run that is merged, and what is refused before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from qlora_cli.errors import Exit, UserError
from qlora_cli.evaluation import digest_of, refuse_damaged
from qlora_cli.merge.merge import Base as Onto
from qlora_cli.model.base import Found, find_base
from qlora_cli.model.owner import start_of
from qlora_cli.model.prequantized import method_of
from qlora_cli.model.source import read_config, read_json
from qlora_cli.recipe import Recipe
from qlora_cli.train.base import recipe_of_base
from qlora_cli.train.card import MERGED as RECORD
from qlora_cli.train.run import Run, read_facts


@dataclass(frozen=True)
class Trained:
    """A finished run, and the base that its adapter is merged onto, before any weight is read.

    stored: whether the base lies there as it was trained on, not to be quantised again.
    """

    run: Run
    recipe: Recipe
    facts: dict[str, Any]
    on_base: Recipe
    found: Found
    stored: bool


def open_run(folder: Path, recipe: Recipe) -> Trained:
    """The finished run in `folder`. Raises UserError where there is none, or its adapter or base do not merge."""
    run = Run(folder)
    facts = read_facts(run)
    if not facts or not run.adapter.exists():
        raise UserError(run.folder, "no finished run there (no adapter/)", "run `qlora train` to its end first")
    refuse_damaged(run.adapter)
    computed = recipe.quantization.model_copy(update={"compute_dtype": facts["base"]["compute_dtype"]})
    recipe = recipe.model_copy(update={"quantization": computed})  # what `auto` was where it trained
    on_base = recipe_of_base(recipe, run)
    found = find_base(on_base)
    refuse_other_tokenizer(run.adapter, found)
    stored = on_base is not recipe or method_of(read_config(found.folder)) is not None
    return Trained(run, recipe, facts, on_base, found, stored)


def refuse_other_tokenizer(adapter: Path, found: Found) -> None:
    """Refuses an adapter beside which lies a tokenizer of other tokens: the merged model would get it."""
    file = adapter / "tokenizer.json"
    if not file.is_file():
        return
    theirs = Tokenizer.from_file(str(file)).get_vocab()
    if theirs != (ours := found.tokenizer.backend_tokenizer.get_vocab()):
        what = f"its {len(theirs):,} tokens are not the {len(ours):,} of the base in {found.folder}"
        raise UserError(file, what, "bring back the tokenizer that was trained with", Exit.REFUSED)


def merged_before(trained: Trained, onto: Onto, out: Path, dtype: str | None) -> dict[str, Any] | None:
    """merge.json of a folder that is this very merge already, but for its certificate; None for any other.

    Raises UserError for another merge of the same adapter, with what is different.
    """
    if not (out / RECORD).is_file():
        return None
    found = read_json(out / RECORD, "it says what was merged")
    if found.get("adapter_digest") != digest_of(trained.run.adapter):
        return None
    wanted = {"base": onto, "dtype": dtype or trained.recipe.quantization.compute_dtype}
    for name, value in wanted.items():
        if found.get(name) != value:
            what = f"it is there with {name} {found.get(name)}, and {value} is asked for; nothing is overwritten"
            raise UserError(out, what, "name a new folder with --out")
    return found | {"out": str(out)}


def refuse_original(folder: Path, onto: str) -> None:
    """Refuses weights as published where the base is stored as it was trained on, with an adapter's start or not."""
    if onto == "original" and (start_of(folder) or method_of(read_config(folder))):
        what = f"{folder} is what the adapter was trained on; the weights as published are others"
        raise UserError("--base original", what, "leave the option out", Exit.REFUSED)
