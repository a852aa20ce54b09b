"""One contestant in a process of its own: builds itself as its users would run it, then takes steps when told to.

    python scripts/bench/worker.py CONTESTANT CASE.json

The commands and answers are those of channel.py. `python scripts/bench/worker.py CONTESTANT --version` prints the
versions that it would run with, or nothing where it is not installed.
"""

from __future__ import annotations

import importlib
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cases import read_case
from channel import Channel

CONTESTANTS = {
    "ours": ("contestant_ours", "run", "qlora"),
    "ours-fast": ("contestant_ours", "fast", "qlora"),
    "ours-offload": ("contestant_ours", "offload", "qlora"),
    "ours-lean": ("contestant_ours", "lean", "qlora"),
    "naive": ("contestant_naive", "plain", "peft"),
    "naive-autocast": ("contestant_naive", "autocast", "peft"),
    "trl": ("contestant_trl", "matched", "trl"),
    "trl-defaults": ("contestant_trl", "defaults", "trl"),
    "unsloth": ("contestant_unsloth", "run", "unsloth"),
    "axolotl": ("contestant_axolotl", "run", "axolotl"),
}
"""Module, function and distribution of each; the function takes the case and the channel."""

IMPORTED = {"qlora": "qlora_cli"}
PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "triton")


def main() -> None:
    """Runs the contestant, or tells its versions."""
    name, case = sys.argv[1:3]
    module, function, distribution = CONTESTANTS[name]
    if case == "--version":
        if find_spec(IMPORTED.get(distribution, distribution)) is not None:
            print(json.dumps(versions(distribution)))
        return
    channel, settings = Channel(), read_case(Path(case))
    if settings.memory_limit_gib:
        from memory import limit

        limit(settings.memory_limit_gib)
    getattr(importlib.import_module(module), function)(settings, channel)


def versions(distribution: str) -> dict[str, str]:
    """The versions of the contestant's packages."""
    found = {}
    for name in (distribution, *PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
