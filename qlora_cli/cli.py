"""The command line: parse, call, print. Results on stdout, messages on stderr, one exit code per kind of end.

A command imports what it needs inside of itself: `qlora --help` loads neither pydantic nor torch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qlora_cli import __version__
from qlora_cli.errors import Exit, UserError, UserErrors

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


def main() -> None:
    """The entry point: a user's mistake becomes its message and exit code, a bug of ours keeps its traceback."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name need not be in the terminal's encoding
    try:
        app(prog_name="qlora")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.code)
    except PermissionError as error:
        print(f"{error.filename}: {error.strerror}. Mend its permissions, or name another place.", file=sys.stderr)
        sys.exit(Exit.FAILED)
    except KeyboardInterrupt:
        print("interrupted; nothing half-done is kept", file=sys.stderr)
        sys.exit(Exit.SIGINT)


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


@app.command()
def validate(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a recipe and say all that is wrong with it.

    Example: qlora validate my.yaml --set adapter.r=64
    """
    from qlora_cli.recipe import load_recipe

    with problems_as_json(as_json):
        checked = load_recipe(recipe, overrides or ())
    if as_json:
        print_json({"problems": [], "recipe": checked.model_dump(by_alias=True)})
    else:
        print(f"{recipe}: valid (its keys; `qlora preview` looks at the data, `qlora train` at the model)")


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[
        str,
        typer.Option(help="auto: continue from the newest checkpoint; never: refuse a run with progress; or a PATH."),
    ] = "auto",
    max_steps: Annotated[
        int | None,
        typer.Option(
            help="Pause with a checkpoint after so many steps; without it the command goes on to the end.", min=1
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Finetune, or continue where the run in output_dir was stopped.

    Example: qlora train configs/quickstart.yaml --set training.seed=1
    """
    from qlora_cli.recipe import load_recipe

    with problems_as_json(as_json):
        checked = load_recipe(recipe, overrides or ())
        quiet_libraries(checked)
        from qlora_cli import commands
        from qlora_cli.display import make_report

        main_process = os.environ.get("RANK", "0") == "0"
        report = make_report(quiet=not main_process)
        try:
            adapter = commands.train(
                checked, recipe.read_bytes(), report, main_process=main_process, resume=resume, pause_at=max_steps
            )
        except commands.Interrupted as interrupted:
            raise typer.Exit(interrupted.code) from None
    if main_process:
        finished = adapter.exists()
        if as_json:
            print_json({"adapter": str(adapter), "finished": finished})
        else:
            print(
                adapter
                if finished
                else f"paused; without --max-steps the command goes on from {adapter.parent / 'checkpoints'}"
            )


@app.command()
def preview(
    recipe: RecipePath,
    overrides: Overrides = None,
    role: Annotated[Literal["train", "eval"], typer.Option(help="Training rows, or held-out ones.")] = "train",
    row: Annotated[int | None, typer.Option(metavar="N", help="Show example N alone, whole; from 1.", min=1)] = None,
    errors: Annotated[bool, typer.Option("--errors", help="List all bad rows instead; exit code 2 if any.")] = False,
    page: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with 20 rows.")] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Rows to show: 3, or one of each source; 0: none.", min=0)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show rows as the model sees them, what is trained, and what an epoch costs; no weight is read.

    Example: qlora preview my.yaml
    """
    from qlora_cli.recipe import load_recipe

    with problems_as_json(as_json):
        if errors and (row or page or limit is not None):
            raise UserError("--errors", "lists the bad rows alone", "leave --row, --html and --limit out")
        checked = load_recipe(recipe, overrides or ())
        quiet_libraries(checked)
        from qlora_cli import commands, display, display_preview, report

        if page:
            report.refuse_foreign(page)
            limit = commands.PAGE_ROWS if limit is None else limit
        look = commands.bad_rows(checked, display.make_report(), role) if errors else None
        result = look or commands.preview(checked, display.make_report(), role, row, limit)
        if page:
            report.write_page(page, result)
    if as_json:
        print_json(result)
    elif page:
        print(page)
    elif errors:
        display_preview.print_bad_rows(result)
    else:
        display_preview.print_preview(result)
    if errors and result["problems"]:
        raise typer.Exit(Exit.USAGE)


@app.command("eval")
def evaluate(
    target: Annotated[Path, typer.Argument(metavar="RUN|RECIPE", help="A run folder, or a recipe.")],
    overrides: Overrides = None,
    adapter: Annotated[Path | None, typer.Option(help="Another adapter folder than the run's.")] = None,
    suite: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this suite of the recipe. May be repeated.")
    ] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Measure what training began with beside it.")] = False,
    merged: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Measure this merged model too.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first rows of each suite.", min=1)] = None,
    again: Annotated[bool, typer.Option("--again", help="Replace answers of other models or rows.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure models side by side: the recipe's suites, or what fits its task on the held-out rows.

    Example: qlora eval runs/quickstart --baseline
    """
    with problems_as_json(as_json):
        checked = recipe_of(target, overrides)
        quiet_libraries(checked)
        from qlora_cli import commands, display_evaluation
        from qlora_cli.display import make_report

        wanted = commands.Wanted(adapter, baseline, merged, suite or (), limit, again)
        result = commands.evaluate(checked, make_report(), wanted)
    if as_json:
        print_json(result)
    else:
        display_evaluation.print_evaluation(result)


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the model: RUN/merged.")] = None,
    base: Annotated[
        Literal["dequantized", "original"],
        typer.Option(help="Weights to add to: dequantized, which were trained on, or the original ones."),
    ] = "dequantized",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Data type written: the run's compute dtype."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fold a run's adapter into the weights, and measure the difference to the unmerged model.

    Example: qlora merge runs/quickstart --out merged
    """
    with problems_as_json(as_json):
        checked = recipe_of(run, None)
        quiet_libraries(checked)
        from qlora_cli import commands, display

        result = commands.merge(run, checked, display.make_report(), out=out, onto=base, dtype=dtype)
    if as_json:
        print_json(result)
    else:
        display.print_merge(result)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or a hub id.", show_default=False)],
    types: Annotated[str, typer.Option(metavar="A,B", help="Only these data types: nf4,int2. Default: all.")] = "",
    data: Annotated[str | None, typer.Option(metavar="FILE", help="Measure perplexity over these rows too.")] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Only the first rows.", min=1)] = None,
    max_length: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens that are read of a row: the model's context.", min=2)
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Print every layer's figures too.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the error by layer: .png or .svg.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="quantization.block_size=128, say. Repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure every data type on a model: error, bits, speed and, with --data, perplexity.

    Example: qlora inspect configs/quickstart/base --types nf4,int2
    """
    from qlora_cli.recipe.of_model import DATA_TYPES, recipe_of_model

    with problems_as_json(as_json):
        if data is None and (limit or max_length):
            raise UserError("--limit, --max-length", "are about the rows of --data", "name them, or leave it out")
        names = [name.strip() for name in types.split(",")] if types else DATA_TYPES
        checked = recipe_of_model(model, names, {"path": data, "limit": limit} if data else None, overrides or ())
        quiet_libraries(checked)
        from qlora_cli import commands, display, report

        if plot:
            report.check_plot(plot)
        result = commands.inspect(checked, names, display.make_report(), max_length)
        if plot:
            report.write_plot(plot, result)
    if as_json:
        print_json(result)
    else:
        display.print_inspection(result, layers)


@app.command()
def quantize(
    target: Annotated[str, typer.Argument(metavar="RECIPE|MODEL", help="A recipe, or a model folder or hub id.")],
    out: Annotated[Path, typer.Option(help="The new folder.", show_default=False)],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Store a quantised base, with the adapter's start where adapter.init changes the base.

    Example: qlora quantize configs/quickstart/base --out small --set quantization.data_type=int2
    """
    from qlora_cli.recipe import load_recipe
    from qlora_cli.recipe.of_model import recipe_to_quantize

    with problems_as_json(as_json):
        given = overrides or ()
        checked = load_recipe(Path(target), given) if os.path.isfile(target) else recipe_to_quantize(target, given)
        quiet_libraries(checked)
        from qlora_cli import commands, display

        result = commands.quantize(checked, display.make_report(), out)
    if as_json:
        print_json(result)
    else:
        display.print_quantized(result)


@app.command()
def arena(
    ratings: Annotated[list[str], typer.Argument(metavar="RATINGS...", help="Files of judgements, folders, patterns.")],
    reference: Annotated[str | None, typer.Option(help="The model whose mean score is 100 percent.")] = None,
    seed: Annotated[int, typer.Option(help="Of the orders.", min=0)] = 0,
    orders: Annotated[int, typer.Option(help="Random orders of the games.", min=2)] = 10_000,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it: .png or .svg.")] = None,
    as_json: AsJson = False,
) -> None:
    """Rate models by judgements: Elo, and scores in percent of a reference's.

    Example: qlora arena ratings/*.jsonl --plot elo.svg
    """
    from qlora_cli import display_arena, report
    from qlora_cli.evaluate import arena as room

    with problems_as_json(as_json):
        if plot:
            report.check_plot(plot)
        result = room.arena(ratings, reference, seed, orders)
        if plot:
            report.write_arena(plot, result)
    if as_json:
        print_json(result)
    else:
        display_arena.print_arena(result)


def recipe_of(target: Path, overrides: list[str] | None) -> Recipe:
    """The recipe of a run folder, as it was understood when the run began, or the recipe in a file."""
    from qlora_cli.recipe import load_recipe

    if not target.is_dir():
        return load_recipe(target, overrides or ())
    resolved = target / "resolved.yaml"
    if not resolved.exists():
        raise UserError(target, "no run folder (no resolved.yaml)", "name the output_dir of a run, or a recipe")
    return load_recipe(resolved, [*(overrides or ()), f"output_dir={json.dumps(str(target), ensure_ascii=False)}"])


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


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a page for people instead.")] = False,
) -> None:
    """Print the JSON Schema of recipes for an editor.

    Example: qlora schema > recipe.schema.json
    """
    from qlora_cli.recipe.document import recipe_json_schema, recipe_markdown

    if markdown:
        print(recipe_markdown(), end="")
    else:
        print_json(recipe_json_schema())


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Where to write it.")] = Path("recipe.yaml"),
    model: Annotated[str | None, typer.Option(help="The base model: a hub id or a folder.")] = None,
    data: Annotated[str | None, typer.Option(help="The training data: a file or a hub id.")] = None,
) -> None:
    """Write a starter recipe with comments. An existing file is never overwritten.

    Example: qlora init my.yaml --model HuggingFaceTB/SmolLM2-135M --data rows.jsonl
    """
    from qlora_cli.recipe.starter import write_starter

    write_starter(path, model, data)
    print(path)
