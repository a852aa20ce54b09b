"""One JSON object from the results of pytest and the machine they come from.

    python scripts/lib/gpu_summary.py RESULTS.xml

{"device", "driver", "torch", "versions", "passed", "failed", "skipped", "seconds", "tests": [{"name", "outcome",
"seconds", "message"}]}. An error in a fixture counts as failed. Where pytest died before it wrote its results, there
are no tests, and `failed` is null.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

PACKAGES = ("qlora", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "triton", "numpy")
OUTCOMES = {"failure": "failed", "error": "failed", "skipped": "skipped"}  # by the element inside of a test case


def main() -> None:
    """Print the summary of the file named on the command line."""
    cases = read_cases(Path(sys.argv[1]))
    tests = [outcome_of(case) for case in cases or ()]
    counts = {kind: sum(test["outcome"] == kind for test in tests) for kind in ("passed", "failed", "skipped")}
    if cases is None:
        counts = dict.fromkeys(counts)
    seconds = round(sum(test["seconds"] for test in tests), 2)
    print(json.dumps({**machine(), **counts, "seconds": seconds, "tests": tests}, indent=1))


def read_cases(path: Path) -> list[ElementTree.Element] | None:
    """The test cases of a JUnit file; None where it is empty, because pytest died."""
    if path.stat().st_size == 0:
        return None
    return list(ElementTree.parse(path).iter("testcase"))


def outcome_of(case: ElementTree.Element) -> dict[str, Any]:
    """What became of one test; `message` says why where it did not pass."""
    test: dict[str, Any] = {
        "name": f"{case.get('classname')}::{case.get('name')}",
        "outcome": "passed",
        "seconds": float(case.get("time", 0)),
    }
    for part in case:
        if part.tag in OUTCOMES:
            test |= {"outcome": OUTCOMES[part.tag], "message": part.get("message")}
    return test


def machine() -> dict[str, Any]:
    """The device and the versions that the results stand on."""
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver(),
        "torch": torch.__version__,
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **installed()},
    }


def installed() -> dict[str, str | None]:
    """The version of each package; null where it is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def driver() -> str | None:
    """The NVIDIA driver's version; None where nvidia-smi does not say it."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        )
    except OSError:
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


if __name__ == "__main__":
    main()
