"""A chart as an SVG inside of a page: no script, colours of the page's style, a title and a description in words."""

from __future__ import annotations

from qlora_cli.report.charts import HEIGHT, WIDTH, Chart, Line, Series, Words, drawn
from qlora_cli.report.page import escaped
from qlora_cli.report.scales import in_words

STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.2rem 1.6rem }
figure { margin: 0 } figcaption { font-weight: 500 } svg { width: 100%; height: auto; display: block }
svg text { fill: var(--soft); font: 13px system-ui, sans-serif; font-variant-numeric: tabular-nums }
svg polyline { fill: none; stroke: var(--line); stroke-width: 1; stroke-linejoin: round }
svg .axis { stroke: var(--soft) } svg .main { stroke: var(--trained); stroke-width: 1.8 }
svg .faint { stroke: var(--trained); stroke-opacity: .35 }
svg .second { stroke: var(--second); stroke-width: 1.8; stroke-dasharray: 6 3 }
svg .limit { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 2 3 }
svg circle.main { fill: var(--trained) } svg circle.second { fill: var(--second); stroke: none }
@media print { .charts { grid-template-columns: 1fr 1fr; gap: 4mm 6mm } svg * { print-color-adjust: exact } }
"""


def figure(chart: Chart) -> str:
    """The chart under its title, as a figure element."""
    key = f"chart-{chart.key}"
    marks = "\n".join(words_of(mark) if isinstance(mark, Words) else line_of(mark) for mark in drawn(chart))
    return f"""<figure><figcaption>{escaped(chart.title)}</figcaption>
<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{key}-title {key}-desc">
<title id="{key}-title">{escaped(chart.title)}</title>
<desc id="{key}-desc">{escaped(described(chart))}</desc>
{marks}
</svg></figure>"""


def line_of(line: Line) -> str:
    """A line, or its dots."""
    if line.dots:
        return "".join(f'<circle class="{line.kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>' for x, y in line.points)
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in line.points)
    return f'<polyline class="{line.kind}" points="{points}"/>'


def words_of(words: Words) -> str:
    """A text; where it starts is what SVG takes for granted."""
    anchor = "" if words.anchor == "start" else f' text-anchor="{words.anchor}"'
    return f'<text x="{words.x:.1f}" y="{words.y:.1f}"{anchor}>{escaped(words.text)}</text>'


def described(chart: Chart) -> str:
    """What a chart shows, for who cannot see it."""
    return ". ".join(_told(one) for one in chart.series if one.kind != "faint") + "."


def _told(series: Series) -> str:
    (first, begin), (last, end) = series.points[0], series.points[-1]
    if first == last:
        return f"{series.name}: {_figure(begin)} at step {first:,.0f}"
    ys = [y for _, y in series.points]
    return (
        f"{series.name}: {_figure(begin)} at step {first:,.0f}, {_figure(end)} at step {last:,.0f}; "
        f"least {_figure(min(ys))}, most {_figure(max(ys))}"
    )


def _figure(value: float) -> str:
    return in_words(float(f"{value:.4g}"))
