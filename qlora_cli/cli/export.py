"""`qlora export`."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.cli.app import AsJson, app, importing, print_json, problems_as_json
from qlora_cli.export.table import EXPORTERS, exporter_of

DESTINATIONS = "; ".join(f"{name}: {exporter.help}" for name, exporter in EXPORTERS.items())
TYPES = ", ".join(f"{exporter.file_type} for {name}" for name, exporter in EXPORTERS.items() if exporter.file_type)


@app.command()
def export(
    target: Annotated[Path, typer.Argument(metavar="RUN|FOLDER", help="A finished run, a model or a PEFT folder.")],
    to: Annotated[str, typer.Option("--to", metavar="NAME", help=f"{DESTINATIONS}.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="The new folder, or .gguf file: RUN/export/NAME.", show_default=False)
    ] = None,
    file_type: Annotated[
        str | None, typer.Option("--type", metavar="TYPE", help=f"Of a GGUF: {TYPES}.", show_default=False)
    ] = None,
    merged: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The merged model: RUN/merged.", show_default=False)
    ] = None,
    base_name: Annotated[
        str | None, typer.Option(metavar="HUB/ID", help="What others call an adapter's base.", show_default=False)
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="USER/REPO", help="Upload it, with the token in HF_TOKEN.", show_default=False),
    ] = None,
    private: Annotated[bool, typer.Option("--private/--public", help="Of a repository that --push makes.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Even if the merge's certificate did not hold.")] = False,
    as_json: AsJson = False,
) -> None:
    """Hand a finished run on: as GGUF, to Ollama, to vLLM, or as a PEFT folder.

    Example: qlora export runs/quickstart --to peft
    """
    with problems_as_json(as_json):
        needs_hub = exporter_of(to).reads_base or push is not None
        if not needs_hub:
            os.environ["HF_HUB_OFFLINE"] = "1"
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        with importing():
            from qlora_cli import display, display_export, exporting

        wanted = exporting.Wanted(to, out, file_type, merged, base_name, push, private, force)
        result = exporting.export(target, wanted, display.make_report().say)
    if as_json:
        print_json(result)
    else:
        display_export.print_export(result)
