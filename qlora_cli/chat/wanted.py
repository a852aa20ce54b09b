"""What `qlora chat` is asked for, checked before anything heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_cli.errors import UserError
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.load import recipe_of
from qlora_cli.recipe.located_yaml import Located, Place

OF_FOLDER = ("model.trust_remote_code", "model.task", "model.attn_implementation", "data.chat_template", "evaluation.")
"""What `--set` may begin with where a model folder is named instead of a run or a recipe."""

GREEDY = 0.0
"""The temperature at which the likeliest token is taken."""

COLDEST, HOTTEST = 1e-3, 1e3
"""Other temperatures: logits divided by less leave float32, and by more they are all alike."""


@dataclass(frozen=True)
class Voices:
    """Which model answers. folder: a model folder that is named by itself.

    adapter: its folder, None for the run's own. merged: the run's merged model. base: what training began with.
    baseline: that and the adapter, side by side.
    """

    folder: Path | None = None
    adapter: Path | None = None
    merged: bool = False
    base: bool = False
    baseline: bool = False

    def check(self) -> None:
        """Raises UserError for options that contradict each other."""
        chosen = [
            name
            for name, given in (
                ("--base", self.base), ("--merged", self.merged), ("--baseline", self.baseline),
            ) if given
        ]  # fmt: skip
        if self.adapter is not None and (self.base or self.merged):
            chosen.append("--adapter")
        if len(chosen) > 1:
            raise UserError(", ".join(chosen), "name different models to talk to", "leave all but one of them out")
        if self.folder is not None and (self.merged or self.base or (self.baseline and self.adapter is None)):
            what = f"needs a run or a recipe, and {self.folder} is a model folder"
            raise UserError(chosen[0], what, "leave it out: a folder answers as it is stored")


@dataclass(frozen=True)
class Sampling:
    """How the next token is taken. max_new_tokens: None for the recipe's. top_p, seed: None where not given."""

    max_new_tokens: int | None = None
    temperature: float = GREEDY
    top_p: float | None = None
    seed: int | None = None

    def check(self) -> None:
        """Raises UserError for a number out of its range, and for one that would have no effect."""
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError("--max-new-tokens", f"is {self.max_new_tokens}", "give a whole number, at least 1")
        if self.temperature != GREEDY and not COLDEST <= self.temperature <= HOTTEST:
            todo = f"give 0 for the likeliest token, or from {COLDEST:g} to {HOTTEST:g}, e.g. 0.7"
            raise UserError("--temperature", f"is {self.temperature:g}", todo)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError("--top-p", f"is {self.top_p:g}", "give a share above 0 and up to 1, e.g. 0.9")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise UserError("--seed", f"is {self.seed}", "give a whole number from 0 to 4294967295")
        for name, value in (("--top-p", self.top_p), ("--seed", self.seed)):
            if value is not None and self.temperature == GREEDY:
                what = "has no effect: at temperature 0 the likeliest token is taken"
                raise UserError(name, what, "add --temperature 0.7, or leave it out")


def is_model_folder(target: Path) -> bool:
    """Whether the target is a transformers folder and no run. Raises UserError for an adapter's folder."""
    if (target / "resolved.yaml").exists():
        return False
    if (target / "adapter_config.json").exists():
        todo = f"name its run, or its recipe with --adapter {target}"
        raise UserError(target, "is an adapter's folder, and an adapter answers on its base alone", todo)
    return (target / "config.json").exists()


def recipe_of_folder(folder: Path, overrides: Sequence[str]) -> Recipe:
    """A recipe that trains nothing, of a model folder. Raises UserError for an override that does nothing here."""
    for text in overrides:
        if not text.strip().startswith(OF_FOLDER):
            known = ", ".join(name.rstrip(".") for name in OF_FOLDER)
            raise UserError(f"--set {text}", "sets nothing that counts here", f"what may be set is {known}")
    values = {"model": {"name_or_path": str(folder)}, "data": {"train": [{"path": os.devnull}]}}
    return recipe_of(values, Located(str(folder), 1, values={("model",): Place(1, 1, 1, str(folder))}), overrides)
