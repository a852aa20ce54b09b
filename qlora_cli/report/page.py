"""A page: one HTML file that loads nothing, runs nothing and can be printed; and how it replaces an older one."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from qlora_cli.data.view import visible
from qlora_cli.errors import Exit, UserError

STYLE = """
:root { color-scheme: light dark; --ink: #1c1f23; --paper: #fff; --soft: #667; --line: #d9dce1; --trained: #0b6b34;
  --ground: #dff3e4; --token: #e6e8ec; --second: #b3470a }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --paper: #15171a; --soft: #9aa0aa; --line: #34383f;
  --trained: #8fe0ab; --ground: #16351f; --token: #2c3037; --second: #ffb074 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2.2rem } p, dt, .path { color: var(--soft) }
h1, h2, h3, dd, td:first-child { overflow-wrap: anywhere }
table { border-collapse: collapse } th, td { padding: .2rem .9rem .2rem 0; text-align: right; vertical-align: top;
  font-variant-numeric: tabular-nums; border-bottom: 1px solid var(--line) }
th { font-weight: 500; color: var(--soft) } th:first-child, td:first-child { text-align: left }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem } dd { margin: 0 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: .3rem;
  padding: .8rem; font: 14px/1.5 ui-monospace, monospace; color: var(--soft) }
@media print {
  :root { color-scheme: light; --ink: #000; --paper: #fff; --soft: #333; --line: #bbb; --trained: #0b6b34;
    --ground: #dff3e4; --token: #e6e8ec; --second: #b3470a }
  body { font-size: 10pt; max-width: none; margin: 0; padding: 0 } pre { font-size: 8.5pt }
  h1, h2, h3 { break-after: avoid } figure, tr, dl > *, pre { break-inside: avoid } p { orphans: 3; widows: 3 }
}
@page { margin: 15mm }
"""


def document(mark: str, title: str, style: str, parts: Iterable[str]) -> str:
    """A whole page of parts that are HTML already. Its policy forbids whatever is not in the page itself.

    mark: a comment in its beginning, by which it is known to be ours.
    """
    return f"""<!doctype html>
{mark}
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}{style}</style>
</head>
<body>
{chr(10).join(parts)}
</body>
</html>
"""


def escaped(text: object) -> str:
    """Text for HTML, with control characters spelled out; half a character, which UTF-8 cannot write, too."""
    return html.escape(visible(str(text))).encode("utf-8", "backslashreplace").decode()


def table(head: Iterable[str], rows: Iterable[Sequence[str]], *, named: bool = False) -> str:
    """A table of cells that are HTML already. named: the first cell of a row is its heading."""
    first = ('<th scope="row">', "</th>") if named else ("<td>", "</td>")
    columns = "".join(f'<th scope="col">{name}</th>' for name in head)
    lines = (
        f"<tr>{first[0]}{cells[0]}{first[1]}{''.join(f'<td>{cell}</td>' for cell in cells[1:])}</tr>\n"
        for cells in rows
    )
    return f"<table><tr>{columns}</tr>\n{''.join(lines)}</table>"


def refuse_strange(path: Path, mark: bytes, kind: str = "page") -> None:
    """Refuses a place for a file of ours where something else is: nothing within its first 200 bytes is `mark`."""
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise UserError(path, what, "name a file in a folder that exists")
    if path.exists():
        with path.open("rb") as file:
            begin = file.read(200)
        if mark not in begin:
            raise UserError(path, f"is there already, and no {kind} of ours", "name another file", Exit.REFUSED)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is at every moment the old one or the new one."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    except OSError as error:
        raise UserError(path, f"cannot be written: {error.strerror}", "name another file", Exit.FAILED) from error
