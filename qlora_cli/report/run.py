"""The report of a run: a page with its result, its curves and its answers, and a picture of the curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_cli.errors import UserError
from qlora_cli.report import facts, measured, svg
from qlora_cli.report.curves import charts
from qlora_cli.report.page import document, escaped, refuse_strange, write_whole
from qlora_cli.report.png import MARK as PICTURE_MARK
from qlora_cli.report.png import picture
from qlora_cli.report.reading import RunFiles, read_run, section

MARK = "<!-- written by qlora report: it may be overwritten -->"
"""In the beginning of every page, so that no other file is ever overwritten."""

STYLE = f"""{svg.STYLE}
.result {{ font-size: 1.15rem; color: var(--ink); font-weight: 500 }}
.wide {{ overflow-x: auto }} .wide td {{ white-space: nowrap }}
.sample {{ margin-bottom: 1.8rem }} .sample p {{ margin: .6rem 0 .2rem }}
.sample pre {{ margin: 0 }} .answer {{ color: var(--ink) }} h3 {{ font-size: 1rem }}
h4 {{ font-size: .9rem; font-weight: 500; color: var(--soft); overflow-wrap: anywhere; margin-bottom: 0 }}
dt {{ white-space: nowrap }} dd {{ min-width: 0 }}
@media (max-width: 36rem) {{ dl {{ grid-template-columns: 1fr; gap: 0 }} dd {{ margin-bottom: .5rem }} }}
@media print {{ .wide {{ overflow: visible }} .wide td {{ white-space: normal }}
  .sample {{ break-inside: avoid }} h4 {{ break-after: avoid }} }}
"""


def check_places(page: Path, png: Path) -> None:
    """Refuses, before anything is written, places where something else is that we did not write."""
    if png.suffix.lower() != ".png":
        raise UserError(png, "is the picture, a PNG", "end its name in .png")
    if page.absolute() == png.absolute():
        raise UserError(page, "is named for the page and for the picture", "name two files")
    refuse_strange(page, MARK.encode())
    refuse_strange(png, PICTURE_MARK, "picture")


def write_report(folder: Path, page: Path | None = None, png: Path | None = None) -> dict[str, Any]:
    """Writes the page and the picture of the run in `folder`, and returns their places, the state, and notes.

    page, png: None for report.html and loss.png in the run folder. No picture is made where no step was logged.
    Nothing of the run is locked or changed.
    """
    run = read_run(folder)
    page, png = page or folder / "report.html", png or folder / "loss.png"
    check_places(page, png)
    drawn = charts(run)
    write_whole(page, run_page(run).encode())
    if drawn:
        write_whole(png, picture(drawn))
    return {
        "page": str(page),
        "png": str(png) if drawn else None,
        "finished": run.finished,
        "step": run.last_step,
        "result": facts.result_line(run),
        "notes": run.notes if drawn else [*run.notes, "no picture: no step was logged yet"],
    }


def run_page(run: RunFiles) -> str:
    """The page of a run."""
    title = f"{escaped(run.folder.resolve().name)}: {escaped(section(run.recipe, 'model').get('name_or_path'))}"
    described = "".join(f"<dt>{escaped(label)}</dt><dd>{escaped(text)}</dd>" for label, text in facts.facts(run))
    figures = "\n".join(map(svg.figure, charts(run))) or "<p>No step was logged yet.</p>"
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="result">{escaped(facts.result_line(run))}</p>',
        f"<dl>{described}</dl>",
        f'<h2>Training</h2><div class="charts">{figures}</div>',
        f"<h2>Plan and reality</h2>{facts.plan_table(run)}",
        f"<h2>Evaluations</h2>{measured.evaluations(run)}",
    ]
    if run.merge is not None:
        parts.append(f"<h2>Merge</h2>{measured.merged(run.merge)}")
    if run.samples:
        parts.append(f"<h2>Answers before and after</h2>{measured.samples(run)}")
    parts += [f"<p>note: {escaped(note)}</p>" for note in run.notes]
    return document(MARK, title, STYLE, parts)
