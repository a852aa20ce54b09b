"""Speed and memory of qlora against its peers, on the same weights, rows and seeds, each in a process of its own.

    python scripts/bench/run.py c1 --data ../shared/data --turns 6 --json c1.json
    python scripts/bench/run.py c2 c3 --python trl=/path/to/venv/bin/python
    python scripts/bench/run.py g1 g2 g3                                      (on a machine with an NVIDIA GPU)

Contestants

    ours           this package's session and optimizer step, from a recipe
    ours-fast      the same with training.memory: fast; on a GPU there are also ours-offload and ours-lean (g2)
    naive          transformers + bitsandbytes + PEFT as in PEFT's guide to quantisation, in a plain loop
    naive-autocast the same with the forward pass under bfloat16 autocast
    trl            TRL 1.16's SFTTrainer.train() at the case's settings
    trl-defaults   the same at SFTConfig's defaults, and dropout 0.05 as TRL's command line has it
    unsloth        FastLanguageModel and the SFTTrainer that it patches     } written from their public interfaces;
    axolotl        `axolotl train` on a YAML file                           } never run here

The case fixes for everyone: NF4 with double quantisation, bfloat16 compute, LoRA r 16 and alpha 32 on all linear
layers, rows per step, longest row, learning rate, seed. Where a name says no more, also: dropout 0, torch's fused
AdamW, a constant rate, gradient norm 0.3, recomputation of activations or not. Weights are random: speed and memory do
not depend on them. A contestant that is not installed is told of and left out. `--python NAME=PATH` runs one under an
interpreter of its own, which needs transformers, peft and bitsandbytes beside it:

    python3 -m venv /opt/bench && /opt/bench/bin/pip install -c scripts/pins.txt -e . trl==1.16.0

Cases: c1 SmolLM2-135M's shape cut to 8 layers, 512 x 1 and 128 x 1; c2 all 30 layers on rows of GSM8K and Alpaca, whole
passes, ours packed to 1,024 tokens and the others in padded batches of 8; c3 Qwen2.5-0.5B's shape as a Llama, 512 x 1;
g1 Llama-3.2-1B's shape, 512 x 8; g2 Llama-3.1-8B's, 2048 x 1, 2048 x 4, 8192 x 1; g3 its longest row in 8, 16 and
24 GiB.

How it is measured

- Same work or no ratio: the first rows' ids, the trained tokens of every turn and the first loss (within 0.01; over
  a whole pass at a learning rate of 1e-7 in c2) must be those of ours. Who fails is printed with the reason instead.
- Contestants take turns (A B C, C B A, ...) in processes that stay alive and block in a read meanwhile. A turn is a few
  optimizer steps, in c2 a pass over the rows; a step's clock runs from one step's start to the next one's, so fetching
  rows counts. The table has medians and, in brackets, the fastest turn; the ratio is the median over the pairs of a
  turn with a 95% bootstrap interval, and that of the fastest turns.
- Peak memory is taken after the turns, during two steps or a pass of their own: on a GPU what torch allocates and
  reserves, on a CPU anonymous resident memory sampled every 5 ms, in all and above the moment the weights were loaded.
- The roof is the fastest square matrix product of the same run in the case's dtype; the fraction counts the matmul
  FLOPs that the step cannot do without (roof.py), so recomputation and padding lower it.
- Start-up is from the process's start until it waits for its first step; each contestant is started `--starts` times,
  in turns, and the fastest counts. The first start of all reads files into the page cache.

On a GPU all contestants of a case hold their memory at once: name fewer by --contestants where they do not fit.
Rows come tokenised to the others and are found in its cache by ours, so preparation of data is in no figure
(scripts/bench_data.py measures that). The machine should do nothing else; the load is in the JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import context
from cases import EVERYONE, SETS
from measure import Effort, measure
from process import Machine
from report import document, table


def main() -> int:
    """Measures the named sets one after the other and prints a table for each case.

    Returns 1 where a contestant failed, or did other work than ours.
    """
    arguments = read_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that models of gigabytes do not stay behind
    with tempfile.TemporaryDirectory(prefix="qlora-bench-models-") as name:
        models = (arguments.models or Path(name)).resolve()
        pythons = dict(pair.split("=", 1) for pair in arguments.python)
        machine = Machine(pythons, arguments.threads, arguments.data.resolve(), models)
        results: list[dict[str, Any]] = []
        written = document(results, arguments.threads)  # now: the load before it
        for chosen in arguments.sets:
            for result in measured(chosen, machine, arguments):
                results.append(result)
                written["results"] = results
                if arguments.json:  # after every case: a later one may fail
                    arguments.json.write_text(json.dumps(written, indent=1) + "\n")
    states = [one["state"] for result in results for one in result.get("contestants", {}).values()]
    return int(any(state not in ("measured", "not installed") for state in states))


def measured(chosen: str, machine: Machine, arguments: argparse.Namespace) -> Any:
    """The results of a set's cases, each printed as soon as it is there."""
    if chosen == "g3":
        found = context.longest_contexts(machine, arguments.contestants or ("ours", "ours-lean", "naive", "trl"))
        print(context.table(found), flush=True)
        yield found
        return
    for case in SETS[chosen]():
        if arguments.only not in case.name:
            continue
        names = tuple(one for one in case.contestants if one in (arguments.contestants or EVERYONE))
        steps = {"steps": arguments.steps} if arguments.steps else {}
        case = replace(case, contestants=names, **steps)
        result = measure(case, machine, Effort(arguments.turns, arguments.starts))
        print(table(result), flush=True)
        yield result


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sets = [*SETS, "g3"]
    parser.add_argument("sets", nargs="+", choices=sets, metavar="SET", help=", ".join(sets))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with text/ and tokenizers/")
    parser.add_argument("--models", type=Path, help="where models of random weights are kept; none: made and removed")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this in their name: '128 x 1'")
    parser.add_argument("--turns", type=int, default=6, help="measurements of each contestant")
    parser.add_argument("--starts", type=int, default=2, help="processes of each contestant whose start is timed")
    parser.add_argument("--steps", type=int, help="optimizer steps of a turn, instead of the case's own")
    parser.add_argument("--contestants", nargs="+", choices=EVERYONE, help="only these; ours must be among them")
    parser.add_argument("--python", nargs="*", default=[], metavar="NAME=PATH", help="a contestant's interpreter")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process, on a CPU")
    parser.add_argument("--json", type=Path, help="where every single measurement goes")
    arguments = parser.parse_args()
    if arguments.contestants and arguments.contestants[0] != "ours":
        arguments.contestants.sort(key=EVERYONE.index)
        if "ours" not in arguments.contestants:
            parser.error("--contestants: ours is what the others are compared with")
    if wrong := [pair for pair in arguments.python if pair.partition("=")[0] not in EVERYONE or "=" not in pair]:
        parser.error(f"--python {wrong[0]}: write NAME=PATH with a name of {', '.join(EVERYONE)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
