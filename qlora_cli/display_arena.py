"""The tables of `qlora arena`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from qlora_cli.data.rows import count
from qlora_cli.data.view import visible
from qlora_cli.display import figures_table

SHOWN_LEFT_OUT = 5
"""So many judgements that were left out are listed; --json has all."""


def print_arena(result: dict[str, Any]) -> None:
    """What was read, the ratings, and where answers were scored the percentages."""
    console = Console(highlight=False)
    elo, percent, left_out = result["elo"], result["percent"], result["left_out"]
    read = f"{count(result['num_files'], 'file')}, {count(result['num_judgements'], 'judgement')}"
    wins = f"the first answer won {result['first_won']:,}, the second {result['second_won']:,}"
    lines = [f"{read}: {wins}, {count(result['ties'], 'tie')}, {len(left_out):,} unparsed"]
    lines += [f"unparsed  {one['where']}: {one['what']}" for one in left_out[:SHOWN_LEFT_OUT]]
    if len(left_out) > SHOWN_LEFT_OUT:
        lines.append(f"unparsed  and {len(left_out) - SHOWN_LEFT_OUT:,} more, which --json lists")
    lines += [f"note      {note}" for note in result["notes"]]
    lines += ["", f"Elo: K {elo['k']}, from {elo['start']:.0f}, mean of {elo['orders']:,} orders, seed {elo['seed']}"]
    console.print(Text(visible("\n".join(lines))), "", sep="\n", soft_wrap=True)
    table = figures_table("model", ("Elo", "±", "95% of orders", "games", "won", "tied", "lost"))
    for row in elo["models"]:
        spread = f"{row['low']:.0f} to {row['high']:.0f}"
        numbers = (f"{row[key]:,}" for key in ("games", "wins", "ties", "losses"))
        table.add_row(Text(visible(row["model"])), f"{row['elo']:.0f}", f"{row['ci95']:.1f}", spread, *numbers)
    console.print(table)
    if percent:
        print_percent(console, percent)


def print_percent(console: Console, percent: dict[str, Any]) -> None:
    """The percentages, over both orders and in each."""
    told = f"\nmean score in percent of {percent['reference']}'s, with its 95% interval over questions\n"
    console.print(Text(visible(told)), soft_wrap=True)
    table = figures_table("model", ("percent", "±", "shown first", "shown second", "judgements"))
    for row in percent["models"]:
        keys = ("percent", "ci95", "shown_first", "shown_second")
        cells = ("-" if row[key] is None else f"{row[key]:.1f}" for key in keys)
        table.add_row(Text(visible(row["model"])), *cells, f"{row['num_judgements']:,}")
    console.print(table)
