"""What `qlora merge` prints: where the models are, and a line of figures for each."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from qlora_cli.display import figures_table

MEASURED = {
    "sequence_classification": ("rows", "largest difference of an output", "same class"),
    "question_answering": ("ends of spans", "largest logit difference", "same token"),
}
"""What a merge is measured over, by task: places, what differs, what is the same; else positions of text."""


def print_merge(result: dict[str, Any]) -> None:
    """What was written, and how far it is from the unmerged model."""
    console = Console(highlight=False)
    for one in result["merges"]:
        console.print(head(one), soft_wrap=True)
        for line in body(one):
            console.print(line, soft_wrap=True, markup=False)
    certified = [one for one in result["merges"] if one["certificate"]]
    if len(certified) > 1:
        print_side_by_side(console, certified)


def head(one: dict[str, Any]) -> str:
    """The folder and how it was made, in a line."""
    quantizing = f", {one['quantize_seconds']:.1f} s of them quantising" if one["quantize_seconds"] >= 0.05 else ""
    base = one["base"] if one["base"] == "merged" else f"onto the {one['base']} base"
    what = one["out"] or f"kept aside at {one['kept']}"
    return f"merged   {what}  ({one['dtype']}, {base}, {one['seconds']:.1f} s{quantizing})"


def body(one: dict[str, Any]) -> list[str]:
    """What there is to say of it, a line each."""
    lines = []
    if one["untied"]:
        names = " and ".join(one["untied"])
        lines.append(f"untied   {names} shared a weight, and have one each now: tie_word_embeddings is false")
    if one["same_base"] is False:
        lines.append("note     the base is not the one that the adapter was trained on")
    found = one["certificate"]
    if found is None:
        return [*lines, "not verified: neither this model nor whether the base is the one trained on (--no-verify)"]
    places, differs, same = MEASURED.get(one["task"], ("positions", "largest logit difference", "same top token"))
    lines.append(
        f"against the unmerged model over {found['positions']:,} {places}: {differs} {found['max_abs']:.2e}, "
        f"mean KL {found['mean_kl']:.2e} nats, 99th percentile {found['p99_kl']:.2e}, {same} "
        f"{found['top1_agreement']:.2%}"
    )
    lines.append(
        f"loss over {found['rows']:,} rows of data.{found['data']}: unmerged {found['loss_unmerged']:.4f}, "
        f"merged {found['loss_merged']:.4f}"
    )
    if found["limit"] is None:
        return lines
    verdict = "holds" if found["held"] else "does NOT hold"
    asked = "" if found["limit"] == found["default_limit"] else f" ({found['default_limit']:.0e} by default)"
    streamed = "; the merged model was read from the disk layer by layer" if found["manner"] == "streamed" else ""
    limit = f"limit {found['limit']:.0e}{asked}"
    lines.append(f"the certificate {verdict}: mean KL {found['mean_kl']:.2e}, {limit}{streamed}")
    if one["out"] is None:
        lines.append("so it has not got its name. To accept it: the same command with a larger --max-kl")
        lines.append(f"to give it up: rm -r {one['kept']}")
    return lines


def print_side_by_side(console: Console, merges: list[dict[str, Any]]) -> None:
    """The figures of several merges in a table."""
    table = figures_table("base", ["mean KL", "p99 KL", "same top", "loss", "unmerged loss"])
    for one in merges:
        found = one["certificate"]
        name = f"{one['base']}, {one['dtype']}"
        figures = (f"{found['mean_kl']:.2e}", f"{found['p99_kl']:.2e}", f"{found['top1_agreement']:.2%}")
        table.add_row(name, *figures, f"{found['loss_merged']:.4f}", f"{found['loss_unmerged']:.4f}")
    console.print(table)
