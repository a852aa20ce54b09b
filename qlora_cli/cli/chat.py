"""The verb that talks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.cli.app import (
    AsJson,
    Overrides,
    app,
    importing,
    print_json,
    problems_as_json,
    quiet_libraries,
    recipe_of,
)
from qlora_cli.errors import Exit, UserError


@app.command()
def chat(
    target: Annotated[
        Path, typer.Argument(metavar="RUN|RECIPE|FOLDER", help="A run folder, a recipe, or a model folder.")
    ],
    overrides: Overrides = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="Ask this and end; - reads it from stdin. Repeated: turns of one conversation."
        ),
    ] = None,
    system: Annotated[str, typer.Option(metavar="TEXT", help="The system's text.", show_default=False)] = "",
    adapter: Annotated[Path | None, typer.Option(help="Another adapter folder than the run's.")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Talk to the run's merged model, as it is stored.")] = False,
    base: Annotated[bool, typer.Option("--base", help="Talk to what training began with.")] = False,
    baseline: Annotated[bool, typer.Option("--baseline", help="Show its replies beside the adapter's.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Longest reply in tokens: evaluation.max_new_tokens.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 takes the likeliest token; above it, tokens are drawn.")
    ] = 0.0,
    top_p: Annotated[
        float | None, typer.Option(metavar="P", help="Draw among the likeliest tokens with this share together: 1.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of the draws: 0.")] = None,
    as_json: AsJson = False,
) -> None:
    """Talk to a base, an adapter or a merged model, with the template that it was trained with.

    Example: qlora chat runs/quickstart --prompt 'Record: Ann sold 3 red kites.' --baseline
    """
    from qlora_cli.chat.wanted import Sampling, Voices, is_model_folder, recipe_of_folder

    with problems_as_json(as_json):
        if as_json and not prompt:
            raise UserError("--json", "is the answer to --prompt", "add --prompt TEXT, or leave it out")
        folder = target if is_model_folder(target) else None
        voices = Voices(folder, adapter, merged, base, baseline)
        sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        voices.check()
        sampling.check()
        checked = recipe_of(target, overrides) if folder is None else recipe_of_folder(folder, overrides or ())
        quiet_libraries(checked)
        with importing():
            from qlora_cli import display_chat
            from qlora_cli.chat.session import opened
            from qlora_cli.display import make_report

        texts = display_chat.read_prompts(prompt or ())
        with opened(checked, make_report(), voices, sampling) as session:
            if texts:
                result = display_chat.answer_prompts(session, system, texts, quiet=as_json)
                interrupted = False
            else:
                interrupted = display_chat.converse(session, system)
    if as_json:
        print_json(result)
    if interrupted:
        raise typer.Exit(Exit.SIGINT)
