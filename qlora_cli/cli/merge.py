"""The verb that folds an adapter into the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora_cli.cli.app import AsJson, app, importing, print_json, problems_as_json, quiet_libraries, recipe_of
from qlora_cli.errors import Exit, UserError


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the model: RUN/merged.")] = None,
    base: Annotated[
        Literal["dequantized", "original", "both"],
        typer.Option(help="Weights to add to: dequantized, which were trained on, the original ones, or each in turn."),
    ] = "dequantized",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Data type written: the run's compute dtype."),
    ] = None,
    quantize: Annotated[
        Literal["nf4", "fp4", "int4", "nf2", "int2"] | None,
        typer.Option(help="Write the merged model quantised too, and say what that costs."),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(metavar="N", help="Held-out rows of the certificate: 64, up to 8,192 tokens.", min=1)
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(metavar="NATS", help="The certificate's limit of the mean KL: by the data type.", min=0),
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="No certificate; merge.json and the card say so.")
    ] = False,
    other_base: Annotated[
        bool, typer.Option("--other-base", help="Go on where the base is not the one trained on.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fold a run's adapter into the weights, and certify that the merged model says what the unmerged one says.

    Example: qlora merge runs/quickstart --out merged
    """
    with problems_as_json(as_json):
        if no_verify and (rows or max_kl is not None):
            raise UserError("--no-verify", "leaves nothing for --rows and --max-kl", "leave it out, or those")
        if not run.is_dir():
            raise UserError(run, "no run folder there", "name the output_dir of a finished run")
        checked = recipe_of(run, None)
        quiet_libraries(checked)
        with importing():
            from qlora_cli import display, display_merge, merging

        wanted = merging.Wanted(
            out=out,
            bases=("dequantized", "original") if base == "both" else (base,),
            dtype=dtype,
            quantize=quantize,
            verify=not no_verify,
            max_kl=max_kl,
            rows=rows,
            other_base=other_base,
        )
        result = merging.merge(run, checked, display.make_report(), wanted)
    if as_json:
        print_json(result)
    else:
        display_merge.print_merge(result)
    if not result["held"]:
        raise typer.Exit(Exit.FAILED)
