"""The verbs of a run: check, plan, look, train, measure, merge."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora_cli.cli.app import (
    AsJson,
    Overrides,
    RecipePath,
    app,
    importing,
    print_json,
    problems_as_json,
    quiet_libraries,
    recipe_of,
)
from qlora_cli.errors import Exit, UserError


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
        with importing():
            from qlora_cli import commands

            commands.import_later_libraries()
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
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="An NVIDIA GPU of this size, 24GiB; without it the machine's GPU or CPU."),
    ] = None,
    rows: Annotated[
        bool, typer.Option("--rows", help="Read the training rows, however long it takes; small files are read anyway.")
    ] = False,
    no_rows: Annotated[bool, typer.Option("--no-rows", help="Do not read the training rows.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a run needs and whether it fits, from the model's config.json alone; exit code 1 if it does not.

    Example: qlora plan my.yaml --gpu 24GiB
    """
    from qlora_cli.recipe import load_recipe

    with problems_as_json(as_json):
        if rows and no_rows:
            raise UserError("--rows, --no-rows", "say the opposite of each other", "leave one of them out")
        checked = load_recipe(recipe, overrides or ())
        quiet_libraries(checked)
        with importing():
            from qlora_cli import commands, display, display_plan

        wanted = rows if rows or no_rows else None
        result = commands.plan(checked, display.make_report(), gpu, wanted)
    if as_json:
        print_json(result)
    else:
        display_plan.print_plan(result)
    if not result["fits"]:
        raise typer.Exit(Exit.FAILED)


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
        with importing():
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
        with importing():
            from qlora_cli import commands, display_evaluation
        from qlora_cli.display import make_report

        wanted = commands.Wanted(adapter, baseline, merged, suite or (), limit, again)
        result = commands.evaluate(checked, make_report(), wanted)
    if as_json:
        print_json(result)
    else:
        display_evaluation.print_evaluation(result)
