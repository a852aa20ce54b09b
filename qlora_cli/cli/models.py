"""The verbs that need no run: models, judgements, and what recipes are made of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.cli.app import AsJson, Overrides, app, importing, print_json, problems_as_json, quiet_libraries
from qlora_cli.errors import UserError


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
        with importing():
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
        with importing():
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
