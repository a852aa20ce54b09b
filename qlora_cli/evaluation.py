"""`qlora eval`: suites over what training began with, the adapter and the merged model, side by side."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count as count_up
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from qlora_cli.data.examples import Examples
from qlora_cli.data.store import part_from_json
from qlora_cli.errors import UserError
from qlora_cli.evaluate.measuring import (
    Answers,
    Subject,
    answered,
    known_answers,
    refuse_other_rows,
    result_of,
    store_result,
)
from qlora_cli.evaluate.suite import Opened
from qlora_cli.model.adapter import WEIGHTS, load_adapter
from qlora_cli.model.base import Base, Found, default_device, find_base, fingerprint, load_base
from qlora_cli.model.continued import CONFIG
from qlora_cli.model.owner import start_of
from qlora_cli.model.prequantized import method_of
from qlora_cli.model.source import read_config, read_json
from qlora_cli.model.whole_folder import MANIFEST, fault
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.remote import with_whole_paths
from qlora_cli.recipe.schema import Adapter, Quantization
from qlora_cli.train.allocator import keep_freed_memory
from qlora_cli.train.base import recipe_of_base
from qlora_cli.train.card import MERGED, refresh
from qlora_cli.train.reading import encode_role, refuse_beyond_context, refuse_seen
from qlora_cli.train.report import Report
from qlora_cli.train.run import Run, date_of, read_facts, read_resolved
from qlora_cli.train.session import say_base
from qlora_cli.train.suites import Reading, context_of, need_held_out, open_suites


@dataclass(frozen=True)
class Wanted:
    """What `qlora eval` was asked for.

    adapter: its folder, None for the run's own. baseline: whether what training began with is measured too.
    merged: a merged model's folder, measured too. suites: their names; none: all of the recipe.
    limit: only the first rows. again: answers of other models or rows are replaced.
    """

    adapter: Path | None = None
    baseline: bool = False
    merged: Path | None = None
    suites: Sequence[str] = ()
    limit: int | None = None
    again: bool = False


def evaluate(recipe: Recipe, report: Report, wanted: Wanted) -> dict[str, Any]:
    """The suites' figures for each model, with intervals; every answer is stored in the run's eval/ folder.

    Where the adapter's start changed the base, the baseline is that start: what training began with.
    """
    recipe = with_whole_paths(recipe)
    run = Run(Path(recipe.output_dir))
    adapter = wanted.adapter or run.adapter
    if not adapter.exists() and (wanted.adapter or not (wanted.baseline or wanted.merged)):
        raise UserError(adapter, "no adapter there", "run `qlora train`, or measure the base alone with --baseline")
    refuse_damaged(adapter)
    refuse_other_labels(recipe, run)
    on_base = recipe_of_base(recipe, run)
    found = find_base(on_base)
    if wanted.merged is not None:
        recipe_of_merged(recipe, wanted.merged)
        refuse_other_merged(wanted.merged, adapter, found)
    suites = suites_of_run(recipe, found, report, wanted, adapter)
    folder = run.evaluations if wanted.limit is None else run.evaluations / f"first-{wanted.limit}"
    folder.mkdir(parents=True, exist_ok=True)
    answers: dict[str, dict[str, Answers]] = {suite.name: {} for suite in suites}

    def measure(subject: Subject) -> None:
        for suite in suites:
            progress = begun(report, suite, subject)
            answers[suite.name][subject.name] = answered(suite, subject, folder, wanted.again, progress)
            report.end()

    if not wanted.again:
        for suite in suites:
            refuse_other_rows(suite, folder)
    if wanted.baseline or adapter.exists():
        base = load_base(on_base, default_device(), found)
        keep_freed_memory(base.device.type)
        say_base(report, on_base, base)
        weights = fingerprint(base.model)  # before the first forward pass
        say_if_another_base(run, weights, report)
        digest = f"{weights} {reads_as(found)}"
        if wanted.baseline:
            with before_training(base, recipe.adapter) as (name, model):
                measure(Subject(name, base, model, digest_before(base, recipe, digest)))
        else:  # what was measured before, and is of this very base, stands beside the adapter
            name = "base" if began_with(base, recipe.adapter) is None else "start"
            for suite in suites:
                if (known := known_answers(suite, name, digest_before(base, recipe, digest), folder)) is not None:
                    answers[suite.name][name] = known
        if adapter.exists():
            model = load_adapter(base, adapter)
            measure(Subject(name_of(adapter, run), base, model, f"{digest} {digest_of(adapter)}"))
            del model
        del base
    if wanted.merged is not None:
        gc.collect()  # one model is in memory at a time
        merged = load_base(recipe_of_merged(recipe, wanted.merged), default_device())
        weights = f"{fingerprint(merged.model)} {reads_as(merged)}"
        measure(Subject(name_of_merged(wanted.merged), merged, merged.model, weights))
    result = told(recipe, suites, answers, folder)
    if wanted.limit is None:
        refresh(run.adapter, run, recipe)
        if wanted.merged is not None and (record := wanted.merged / MERGED).is_file():
            refresh(wanted.merged, run, recipe, read_json(record, "it says what was merged"))
    return result


def suites_of_run(recipe: Recipe, found: Found, report: Report, wanted: Wanted, adapter: Path) -> list[Opened]:
    """The suites that are asked for, with their rows read, none of them trained on."""
    run = Run(Path(recipe.output_dir))
    held_out = Examples()
    if need_held_out(recipe, wanted.suites):
        held_out = held_out_rows(recipe, found, report, run, adapter)
    trained = (read_facts(run_of(adapter) or run) or {}).get("data", {}).get("parts", [])
    reading = Reading(report, date_of(run), [*map(part_from_json, trained)])
    suites = open_suites(context_of(recipe, found, reading, held_out, wanted.limit), wanted.suites)
    for line in (line for suite in suites for line in suite.told):
        report.say(f"eval     {line}")
    return suites


def refuse_other_labels(recipe: Recipe, run: Run) -> None:
    """Refuses classes or added tokens that are others, or in another order, than those that the run was trained on."""
    if run.resolved.exists() and run.adapter.exists():
        trained = read_resolved(run).get("model") or {}
        now = {"labels": list(recipe.model.labels), "num_labels": recipe.model.num_labels}
        now |= {"added_tokens": list(recipe.model.added_tokens)}
        for name, value in now.items():
            if (before := trained.get(name, value)) != value:
                what = f"is {value}, and the run was trained with {before}"
                raise UserError(f"model.{name}", what, "give the key its value back: the adapter knows no others")


def reads_as(found: Found) -> str:
    """SHA-256 of what turns text into ids and ends an answer: answers depend on it as on the weights."""
    text = found.tokenizer.backend_tokenizer.to_str() + str(sorted(found.stop_token_ids))
    return hashlib.sha256(text.encode()).hexdigest()


def digest_before(base: Base, recipe: Recipe, digest: str) -> str:
    """The digest of what training began with. digest: the base's; a start that changed the base is part of that."""
    start = began_with(base, recipe.adapter)
    return digest if start is None else f"{digest} {digest_of(start)}"


def refuse_other_merged(folder: Path, adapter: Path, found: Found) -> None:
    """Refuses a merged folder of another adapter, as its merge.json says, or one that reads text otherwise."""
    record = folder / "merge.json"
    if record.is_file() and adapter.exists():
        made_of = read_json(record, "qlora merge writes it").get("adapter_digest", digest_of(adapter))
        if made_of != digest_of(adapter):
            what = f"was merged from another adapter than {adapter}"
            raise UserError(f"--merged {folder}", what, "run `qlora merge` again, or name another folder")
    if (folder / "tokenizer.json").is_file():
        theirs = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
        if theirs != found.tokenizer.backend_tokenizer.get_vocab():
            what = "its tokenizer is another one, so the rows would be other tokens to it"
            raise UserError(f"--merged {folder}", what, "name a folder that `qlora merge` wrote of this run")


def held_out_rows(recipe: Recipe, found: Found, report: Report, run: Run, adapter: Path) -> Examples:
    """The recipe's held-out rows. Raises UserError where there are none, or where the adapter was trained on them."""
    if not (recipe.data.eval or recipe.data.eval_fraction):
        raise UserError(
            "data.eval",
            "no held-out data",
            "name rows that are not trained on: --set 'data.eval=[{path: heldout.jsonl}]'",
        )
    examples = encode_role(recipe, found, "eval", report, date_of(run))
    refuse_seen(recipe, run_of(adapter) or run, examples)
    refuse_beyond_context(found, examples)
    return examples


def told(
    recipe: Recipe, suites: Sequence[Opened], answers: dict[str, dict[str, Answers]], folder: Path
) -> dict[str, Any]:
    """What `qlora eval` says, and writes of each suite.

    models: the figures of each model by name; where the recipe names its suites, by NAME.FIGURE.
    """
    results = []
    models: dict[str, dict[str, float]] = {}
    for suite in suites:
        result = result_of(suite, answers[suite.name], recipe.evaluation.bootstrap_resamples)
        result["file"] = str(folder / f"{suite.name}.json")
        store_result(suite, result, folder)
        results.append(result)
        for name, figures in result["models"].items():
            prefix = f"{suite.name}." if recipe.evaluation.suites else ""
            models.setdefault(name, {}).update({prefix + label: found["value"] for label, found in figures.items()})
    return {"models": models, "suites": results, "samples": samples(suites, answers)}


def samples(suites: Sequence[Opened], answers: dict[str, dict[str, Answers]], count: int = 2) -> list[dict[str, str]]:
    """The first prompts of the suites that generate, with the answer of each model."""
    found = []
    for suite in suites:
        if suite.sample is None:
            continue
        given = answers[suite.name]
        for row, one in enumerate(next(iter(given.values()))[:count]):
            found.append({**suite.sample(one), **{name: each[row]["generated"] for name, each in given.items()}})
    return found


def begun(report: Report, suite: Opened, subject: Subject) -> Callable[[int], None]:
    """Begins the progress of a suite over a model, and returns what tells how many rows are answered."""
    report.measure(f"{subject.name} {suite.name}", suite.num_rows)
    first = count_up()

    def tell(done: int) -> None:
        if next(first) == 0 and done:
            report.say(
                f"eval     {subject.name} {suite.name}: {done:,} of {suite.num_rows:,} answers are there already"
            )
        report.advance(done)

    return tell


@contextmanager
def before_training(base: Base, adapter: Adapter) -> Iterator[tuple[str, Any]]:
    """What training began with, by name: the base, or the start, a base with the adapter that training went on from."""
    start = began_with(base, adapter)
    if start is None:
        yield "base", base.model
        return
    model = load_adapter(base, start)
    yield "start", model
    model.unload()  # which gives the base its own layers back


def began_with(base: Base, adapter: Adapter) -> Path | None:
    """The adapter folder that training began with: that of a start which changed the base, or of adapter.from."""
    return start_of(base.folder) or (Path(adapter.from_) if adapter.from_ is not None else None)


def recipe_of_merged(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe by which a merged folder is measured: as it is stored, quantised or not, and no token added."""
    if not (folder / "config.json").is_file():
        raise UserError(f"--merged {folder}", "no merged model there", "run `qlora merge`, or name its folder")
    config = read_config(folder)
    if method_of(config) is None:
        dtype = config.get("dtype", "float32")
        plain = Quantization(data_type="none", compute_dtype="bfloat16" if dtype == "bfloat16" else "float32")
    else:
        plain = Quantization(compute_dtype=recipe.quantization.compute_dtype)
    place: dict[str, Any] = {"name_or_path": str(folder), "revision": None, "added_tokens": []}
    model = recipe.model.model_copy(update=place)
    adapter = type(recipe.adapter)()
    return recipe.model_copy(update={"model": model, "quantization": plain, "adapter": adapter})


def run_of(adapter: Path) -> Run | None:
    """The run that an adapter's folder or checkpoint lies in, if it lies in one."""
    runs = (Run(folder) for folder in adapter.absolute().parents[:2])
    return next((run for run in runs if run.facts.exists()), None)


def name_of(adapter: Path, run: Run) -> str:
    """What an adapter is called in tables and files: `adapter` where it is the run's, else by its folder."""
    if adapter.resolve() == run.adapter.resolve():
        return "adapter"
    folder = adapter.resolve()
    name = folder.parent.name if folder.name == "adapter" else folder.name
    return f"adapter-{name}" if name in ("", "adapter", "base", "start", "merged") else name


def name_of_merged(folder: Path) -> str:
    """What a merged model is called in tables and files: `merged`, or with its folder's name behind."""
    name = folder.resolve().name
    return "merged" if name == "merged" else f"merged-{name.removeprefix('merged-')}"


def digest_of(adapter: Path) -> str:
    """SHA-256 of an adapter's weights and configuration."""
    total = hashlib.sha256()
    for name in (WEIGHTS, CONFIG):
        total.update((adapter / name).read_bytes())
    return total.hexdigest()


def refuse_damaged(adapter: Path) -> None:
    """Refuses an adapter folder whose files are not those that its manifest signs; another tool's has no manifest."""
    if (adapter / MANIFEST).exists() and (reason := fault(adapter)):
        raise UserError(adapter, reason, "train again, or take the adapter out of the newest checkpoint")


def say_if_another_base(run: Run, digest: str, report: Report) -> bool:
    """Tells where the base in memory is not the one that the run was trained on; returns whether it is."""
    facts = read_facts(run)
    same = facts is None or facts["fingerprints"]["base"] == digest
    if not same:
        report.say("note     the base differs from the one trained on: weights, config, data type, device or library")
    return same
