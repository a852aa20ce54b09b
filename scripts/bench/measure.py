"""One case from its files to every single measurement: starts, gate, turns, memory, roof."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cases import Case
from process import Died, Machine, Worker
from roof import required_flops
from stats import turns

LOSS_TOLERANCE = 1e-2
MEMORY_STEPS = 2


@dataclass(frozen=True)
class Effort:
    """turns: measurements of each contestant. starts: fresh processes of each whose start is timed."""

    turns: int = 6
    starts: int = 2


def measure(case: Case, machine: Machine, effort: Effort) -> dict[str, Any]:
    """Every figure of a case. Per contestant `state`: "measured", "not installed", or why it has no ratio."""
    with tempfile.TemporaryDirectory(prefix="qlora-bench-") as name:
        folder = Path(name)
        # the first command and the last, for memory; over drawn rows a turn to warm up besides
        steps = 2 + effort.turns if case.data else 1 + MEMORY_STEPS + case.steps * (1 + effort.turns)
        case = replace(case, total_steps=steps, folder=name)
        file = case.write(folder / "case.json")
        reference = case.contestants[0]
        machine.call(reference, folder, "prepare.py", str(file), str(machine.models), str(machine.data))
        roofs = [json.loads(machine.call(reference, folder, "roof.py"))]
        found: dict[str, dict[str, Any]] = {one: {"state": ""} for one in case.contestants}
        workers = start_all(file, machine, found, effort.starts)
        try:
            contend(case, workers, found, effort.turns)
        finally:
            for worker in workers.values():
                worker.stop()
        roofs.append(json.loads(machine.call(reference, folder, "roof.py")))
        lengths = [len(row["input_ids"]) for row in case.read_rows()]
    lengths = lengths if case.data else [case.length] * case.rows_per_step * case.steps
    for one in found.values():
        if one.get("seconds"):
            one["required_flops"] = required_flops(case.shape, lengths, one["trained"][0])
    roof = {dtype: max(each[dtype] for each in roofs) for dtype in roofs[0]}
    return {"case": case.name, "compute": case.compute, "roof_flops_per_s": roof, "contestants": found}


def start_all(file: Path, machine: Machine, found: Mapping[str, dict[str, Any]], starts: int) -> dict[str, Worker]:
    """The workers of those that are installed; each start is timed, one process at a time, and the last one stays."""
    workers: dict[str, Worker] = {}
    for contestant, values in found.items():
        values["versions"] = machine.versions(contestant, file.parent)
        values["state"] = "measured" if values["versions"] else "not installed"
        values |= {"start_s": [], "first_step_s": [], "seconds": [], "trained": [], "padded": []}
    for turn in turns([*found], starts):
        for contestant in turn:
            values = found[contestant]
            if values["state"] != "measured":
                continue
            if contestant in workers:
                workers.pop(contestant).stop()
            try:
                start(Worker(machine, contestant, file), contestant, values, workers)
            except Died as died:
                values["state"] = f"failed: {died.said}"
                workers.pop(contestant, None)
    return workers


def start(worker: Worker, contestant: str, values: dict[str, Any], workers: dict[str, Worker]) -> None:
    """Takes the first step, or pass, which shows what the gate asks for, and notes how long all that took."""
    workers[contestant] = worker
    values["steps_of_pass"] = worker.facts.get("steps_of_pass")
    values["start_s"].append(worker.start_s)
    values["first"] = worker.ask("steps", 1)
    values["first_step_s"].append(worker.start_s + values["first"]["seconds"][0])


def contend(case: Case, workers: dict[str, Worker], found: Mapping[str, dict[str, Any]], number: int) -> None:
    """The rest of the first pass or a turn to warm up, the gate, the turns, and memory last."""
    for contestant in list(workers):
        values = found[contestant]
        rest = values["steps_of_pass"][0] - 1 if case.data else case.steps
        warm = told(workers, contestant, values, "steps", rest) if rest else {}
        if case.data and warm:
            values["first"] = joined(values["first"], warm)
    for turn, order in enumerate(turns([*workers], number)):
        for contestant in order:
            values = found[contestant]
            steps = values["steps_of_pass"][1 + turn] if case.data else case.steps
            if answer := told(workers, contestant, values, "steps", steps):
                for name in ("seconds", "trained", "padded"):
                    values[name].append(sum(answer[name]))
                values.setdefault("steps", []).append(answer)
    for contestant in list(workers):
        values = found[contestant]
        steps = values["steps_of_pass"][1 + number] if case.data else MEMORY_STEPS
        values["memory"] = told(workers, contestant, values, "memory", steps)
    gate(case, found)


def told(workers: dict[str, Worker], contestant: str, values: dict[str, Any], do: str, n: int) -> dict[str, Any]:
    """The worker's answer; of one that dies nothing, now and later."""
    if contestant not in workers:
        return {}
    try:
        return workers[contestant].ask(do, n)
    except Died as died:
        values["state"] = f"failed: {died.said}"
        workers.pop(contestant).stop()
        return {}


def joined(first: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """One answer out of two: sums add up, lists are put one behind the other."""
    return {name: first[name] + rest[name] for name in ("seconds", "losses", "trained", "padded", "rows")}


def gate(case: Case, found: Mapping[str, dict[str, Any]]) -> None:
    """Sets the state of everyone who did other work than the first contestant: such a ratio would mean nothing."""
    ours = found[case.contestants[0]]
    for values in found.values():
        if values["state"] == "measured" and (reasons := differences(ours, values)):
            values["state"] = f"refused: {'; '.join(reasons)}"


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """How the work of two contestants differs: rows, trained tokens, the loss before anything is learned."""
    if ours["state"] != "measured":
        return [] if ours is theirs else ["nothing to compare with"]
    reasons = []
    if ours["first"]["rows"] != theirs["first"]["rows"]:
        reasons.append("the first rows are others")
    for name, one, other in (
        ("first", sum(ours["first"]["trained"]), sum(theirs["first"]["trained"])),
        ("turns'", ours["trained"], theirs["trained"]),
    ):
        if one != other:
            reasons.append(f"the {name} trained tokens are {other}, not {one}")
    losses = [mean_loss(one["first"]) for one in (ours, theirs)]
    if not abs(losses[0] - losses[1]) <= LOSS_TOLERANCE:  # which NaN is not
        reasons.append(f"the first loss is {losses[1]:.4f}, not {losses[0]:.4f}")
    return reasons


def mean_loss(answer: dict[str, Any]) -> float:
    """The loss per trained token of the steps of an answer."""
    weighted = sum(loss * tokens for loss, tokens in zip(answer["losses"], answer["trained"], strict=True))
    return float(weighted / sum(answer["trained"]))
