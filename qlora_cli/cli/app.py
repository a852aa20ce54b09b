"""The application: what every command takes, and how mistakes are told.

A command imports what it needs inside of itself: `qlora --help` loads neither pydantic nor torch.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_cli import __version__
from qlora_cli.errors import UserError, UserErrors

if TYPE_CHECKING:
    from qlora_cli.recipe import Recipe

# plain help: it needs no rich, and is the same in a terminal, a pipe and a log
app = typer.Typer(
    name="qlora",
    help="Finetune language models in 4 bits from a YAML recipe.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a key: training.learning_rate=1e-4. May be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for problems too.")]


@contextmanager
def problems_as_json(wanted: bool) -> Iterator[None]:
    """Prints a user's mistakes as one JSON object on stdout where `wanted`, and ends with their exit code."""
    try:
        yield
    except UserError as error:
        if not wanted:
            raise
        problems = error.problems if isinstance(error, UserErrors) else (error,)
        print_json({"problems": [{"where": one.where, "what": one.what, "todo": one.todo} for one in problems]})
        raise typer.Exit(error.code) from None


def print_json(result: dict[str, Any]) -> None:
    """One object on stdout; ASCII, so that any terminal and any pipe takes it."""
    print(json.dumps(result, indent=2))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"qlora {__version__}")
        raise typer.Exit


@app.callback()
def qlora(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Finetune language models in 4 bits from a YAML recipe.

    qlora init my.yaml --data rows.jsonl, then qlora train my.yaml, qlora eval, qlora merge
    """


def recipe_of(target: Path, overrides: list[str] | None) -> Recipe:
    """The recipe of a run folder, as it was understood when the run began, or the recipe in a file."""
    from qlora_cli.recipe import load_recipe

    if not target.is_dir():
        return load_recipe(target, overrides or ())
    resolved = target / "resolved.yaml"
    if not resolved.exists():
        raise UserError(target, "no run folder (no resolved.yaml)", "name the output_dir of a run, or a recipe")
    return load_recipe(resolved, [*(overrides or ()), f"output_dir={json.dumps(str(target), ensure_ascii=False)}"])


@contextmanager
def importing() -> Iterator[None]:
    """For imports of torch and its friends: without the garbage collector they take less time.

    It would go through their million objects again and again, finds nothing, and is spared them for good.
    """
    if "torch" in sys.modules:  # in a process of many commands
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def quiet_libraries(recipe: Recipe) -> None:
    """Before torch and its friends are imported: no network where nothing remote is named, none of their chatter.

    What users must know of a library's behaviour, our own lines say.
    """
    import logging
    import warnings

    from qlora_cli.recipe.remote import names_something_remote

    if not names_something_remote(recipe):
        os.environ["HF_HUB_OFFLINE"] = "1"
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
