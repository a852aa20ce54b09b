"""`qlora chat`: what is talked to, loaded as `qlora eval` loads it, and the encoding that it was trained with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from qlora_cli.chat.plain import AS_IT_STANDS, asked_as, templated
from qlora_cli.chat.reply import Manner, Speaker, always
from qlora_cli.chat.wanted import Sampling, Voices
from qlora_cli.data.chat import chat_settings, find_template
from qlora_cli.data.prompts import Prompts
from qlora_cli.data.row_task import RowTask
from qlora_cli.errors import UserError
from qlora_cli.evaluate.generate import Decoding
from qlora_cli.evaluation import (
    began_with,
    name_of,
    recipe_of_merged,
    refuse_damaged,
    refuse_other_merged,
    run_of,
    say_if_another_base,
)
from qlora_cli.model.adapter import load_adapter
from qlora_cli.model.base import Base, Found, default_device, find_base, fingerprint, load_base, readable_bytes
from qlora_cli.model.kept_weights import keep_weights
from qlora_cli.model.prequantized import method_of
from qlora_cli.model.source import read_config
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.remote import with_whole_paths
from qlora_cli.recipe.schema import Quantization
from qlora_cli.train.base import recipe_of_base
from qlora_cli.train.facts import digest
from qlora_cli.train.report import Report
from qlora_cli.train.room import room_on
from qlora_cli.train.run import Run, date_of, read_facts
from qlora_cli.train.session import say_base


@dataclass(frozen=True)
class Session:
    """All that conversations need. speakers: one, or two that are compared.

    asked: puts a text into the prompt of the training rows; None where a chat template does, or rows are verbatim.
    """

    speakers: list[Speaker]
    prompts: Prompts
    manner: Manner
    task: str
    has_template: bool
    asked: Callable[[str], str] | None


@dataclass(frozen=True)
class Place:
    """Where a session's models lie. recipe: by which the base loads. run: whose template and base are meant, if any."""

    recipe: Recipe
    run: Run | None
    adapter: Path | None


@contextmanager
def opened(recipe: Recipe, report: Report, voices: Voices, sampling: Sampling) -> Iterator[Session]:
    """The session for a `with` block. Raises UserError where there is nothing to talk to."""
    refuse_task(recipe)
    place = place_of(recipe if voices.folder else with_whole_paths(recipe), voices)
    found = find_base(place.recipe)
    if voices.merged and place.run:
        refuse_other_merged(found.folder, place.run.adapter, found)
    recipe = with_trained_template(recipe, place.run, found, report)
    today = date_of(place.run) if place.run else date.today()
    settings = chat_settings(recipe.data, found.tokenizer, found.stop_token_ids, today, RowTask.of(recipe))
    has_template = settings.template is not None and found.task == "causal_lm"
    with ExitStack() as stack:
        prompts = stack.enter_context(Prompts(settings))  # compiles the template while the weights are read
        speakers = speakers_of(place, found, voices, report)
        asked = None
        if has_template:
            report.say(f"chat     {settings.called}, {', '.join(settings.stops)} ends a turn")
        elif found.task == "causal_lm":
            words, asked = asked_as(recipe.data.train[0]) if voices.folder is None else AS_IT_STANDS
            report.say("chat     no chat template, and no text before it is remembered")
            report.say(f"chat     each text is {words}")
        else:
            template = None if voices.folder else recipe.data.train[0].template
            words, asked = templated(template.prompt) if template else ("a source of its own", None)
            report.say("chat     no text before it is remembered")
            report.say(f"chat     each text is {words}")
        manner = Manner(decoding_of(recipe, sampling), sampling, verbatim=not has_template)
        yield Session(speakers, prompts, manner, found.task, has_template, asked)


def refuse_task(recipe: Recipe) -> None:
    """Refuses a model that writes no text."""
    task = recipe.model.task
    if task not in ("causal_lm", "seq2seq_lm"):
        what = f"is {task}, which writes no text: there is nothing to chat with"
        raise UserError("model.task", what, "measure it with `qlora eval`")


def place_of(recipe: Recipe, voices: Voices) -> Place:
    """Where everything lies. Raises UserError for what is not there."""
    run, adapter = Run(Path(recipe.output_dir)), voices.adapter
    if voices.folder is None and adapter is None and not (voices.base or voices.merged):
        adapter = run.adapter
    if adapter is not None:
        if not adapter.exists():
            raise UserError(adapter, "no adapter there", "run `qlora train`, or talk to the base alone with --base")
        refuse_damaged(adapter)
    of_adapter = None if adapter is None else run_of(adapter)
    if voices.folder is not None:
        return Place(as_stored(recipe, voices.folder), of_adapter, adapter)
    on = as_stored(recipe, run.folder / "merged") if voices.merged else recipe_of_base(recipe, run)
    return Place(on, of_adapter or run, adapter)


def as_stored(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe by which a model folder loads as it is stored, quantised or not."""
    plain = recipe_of_merged(recipe, folder)
    if method_of(read_config(folder)) is None:
        return plain
    return plain.model_copy(update={"quantization": Quantization()})


def with_trained_template(recipe: Recipe, run: Run | None, found: Found, report: Report) -> Recipe:
    """The recipe with the template that the run was trained with; where its file has changed, the adapter's copy of it.

    Tells where neither is the one that run.json knows.
    """
    facts = (run and read_facts(run)) or {}
    fingerprints = facts.get("fingerprints")
    trained = fingerprints.get("chat_template") if isinstance(fingerprints, dict) else None
    if run is None or trained is None:
        return recipe

    def template_of(named: str | None) -> str:
        try:
            return digest(str(find_template(named, found.tokenizer)[1]))
        except UserError:
            return ""

    if template_of(recipe.data.chat_template) == trained:
        return recipe
    kept = run.adapter / "chat_template.jinja"
    if kept.is_file() and template_of(str(kept)) == trained:
        report.say(f"note     the template that was trained with is the adapter's: {kept}")
        return recipe.model_copy(update={"data": recipe.data.model_copy(update={"chat_template": str(kept)})})
    report.say("note     the chat template is not the one trained with")
    return recipe


def speakers_of(place: Place, found: Found, voices: Voices, report: Report) -> list[Speaker]:
    """The models that answer, all of them on one base in memory."""
    base = load_base(place.recipe, default_device(), found)
    say_base(report, place.recipe, base)
    stored = voices.merged or voices.folder is not None
    if place.run and not voices.merged:
        say_if_another_base(place.run, fingerprint(base.model), report)  # before the first forward pass
    start = None if stored else began_with(base, place.recipe.adapter)
    before = "base" if start is None else "start"
    if place.adapter is None:
        name = "merged" if voices.merged else "model" if voices.folder else before
        return [Speaker(name, base, always(base.model if start is None else load_adapter(base, start)))]
    name = name_of(place.adapter, Run(Path(place.recipe.output_dir)))
    if voices.baseline and start is not None:
        both = {before: start, name: place.adapter}
        return [Speaker(one, base, partial(_loaded, base, folder)) for one, folder in both.items()]
    model = load_adapter(base, place.adapter)
    read_faster(base, report)
    adapted = Speaker(name, base, always(model))
    return [Speaker(before, base, partial(_without_adapter, model)), adapted] if voices.baseline else [adapted]


def read_faster(base: Base, report: Report) -> None:
    """Keeps the layers' weights dequantised on a CPU, as far as half of the free memory goes; no bit changes.

    There every token would dequantise all of them. A GPU has kernels that multiply by 4 bits.
    """
    if base.device.type == "cpu":
        kept = keep_weights(base.model, base.compute_dtype, room_on(base.device).free_bytes // 2)
        if kept.number:
            report.say(f"memory   {kept.words}, {readable_bytes(kept.num_bytes)} beside the rest")


@contextmanager
def _without_adapter(model: Any) -> Iterator[Any]:
    with model.disable_adapter():
        yield model


@contextmanager
def _loaded(base: Base, folder: Path) -> Iterator[Any]:
    """The base with an adapter for the block: two adapters that train modules in full do not stand side by side."""
    model = load_adapter(base, folder)
    try:
        yield model
    finally:
        model.unload()


def decoding_of(recipe: Recipe, sampling: Sampling) -> Decoding:
    """The recipe's generation settings with the length that was asked for."""
    decoding = Decoding(*(getattr(recipe.evaluation, name) for name in Decoding._fields))
    return decoding._replace(max_new_tokens=sampling.max_new_tokens or decoding.max_new_tokens)
