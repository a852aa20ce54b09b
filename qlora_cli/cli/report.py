"""`qlora report`: the page and the picture of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.cli.app import AsJson, app, print_json, problems_as_json


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, finished or not.", show_default=False)],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The page: RUN/report.html.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="The picture: RUN/loss.png.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a page and a picture of a run: curves, evaluations, answers before and after, plan and reality.

    Example: qlora report runs/quickstart
    """
    from qlora_cli.report import write_report

    with problems_as_json(as_json):
        result = write_report(run, out, png)
    if as_json:
        print_json(result)
        return
    for note in result["notes"]:
        print(f"note     {note}", file=sys.stderr)
    print(result["page"])
    if result["png"]:
        print(result["png"])
