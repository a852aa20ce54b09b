"""A folder for `ollama create`: the GGUF, and a Modelfile with the template and the stop tokens of the training."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli import __version__
from qlora_cli.data.chat import ChatSettings, chat_settings
from qlora_cli.errors import Exit, UserError
from qlora_cli.export.asked import Asked, asked_of
from qlora_cli.export.go_template import VERBATIM, go_template, literal
from qlora_cli.export.source import Facts, Order, Source, context_of, facts_of, refuse_place, task_of
from qlora_cli.export.turns import START, Between, Turns, turns_of
from qlora_cli.model.source import read_config
from qlora_cli.model.tokenizer import load_tokenizer, stop_token_ids
from qlora_cli.model.whole_folder import publish_new
from qlora_cli.recipe.schema import Data, Model

MODEL = "model.gguf"
MOST_CONTEXT = 8192
"""The largest num_ctx that is written: Ollama takes the memory for all of it at once."""


@dataclass(frozen=True)
class Reading:
    """How the model reads conversations. context: num_ctx.

    turns: None where it has no template; then `asked` is the prompt of its training rows, None where nobody knows it.
    """

    settings: ChatSettings
    turns: Turns | None
    context: int | None
    asked: Asked | None = None


def write_ollama(source: Source, order: Order) -> Facts:
    """Writes the folder `order.out`, whole or not at all. Raises UserError before that for what cannot be expressed."""
    from qlora_cli.export.gguf import check_gguf, write_gguf
    from qlora_cli.export.gguf_tokenizer import Trained

    config = read_config(source.folder)
    if (task := task_of(config)) != "causal_lm":
        raise UserError(source.folder, f"Ollama generates text, and this is a model for {task}", "serve it otherwise")
    refuse_place(order.out, source.inputs)
    trained = Trained(source.template_kwargs, source.today)
    check_gguf(source.folder, order.file_type, trained)
    reading, notes = read_template(source), []
    modelfile(source.name, reading, adds_bos=False)  # refuses now what it would refuse after the weights
    whole = context_of(config)
    if whole is not None and whole > MOST_CONTEXT:
        notes.append(f"num_ctx is {MOST_CONTEXT:,}; the model reads {whole:,} tokens, for which memory must suffice")
    facts: dict[str, Any] = {}

    def write(place: Path) -> None:
        facts.update(write_gguf(source.folder, place / MODEL, order.file_type, order.say, trained))
        text, told = modelfile(source.name, reading, adds_bos(place / MODEL))
        notes.extend(told)
        (place / "Modelfile").write_text(text, encoding="utf-8")

    publish_new(order.out, write)
    create = ["ollama", "create", source.name, "-f", str(order.out / "Modelfile")]
    return facts_of(facts, notes, [shlex.join(create), shlex.join(["ollama", "run", source.name])])


def read_template(source: Source) -> Reading:
    """The folder's chat template as turns, its stop tokens and its context.

    Raises UserError where the template cannot be written for Ollama.
    """
    tokenizer = load_tokenizer(source.folder, Model(name_or_path=str(source.folder)))
    data = Data(train=[{"path": "none"}], chat_template_kwargs=source.template_kwargs)  # type: ignore[list-item]
    stops = stop_token_ids(source.folder, tokenizer)
    settings = chat_settings(data, tokenizer, stops, source.today)
    context = context_of(read_config(source.folder))
    turns = None if settings.template is None else turns_of(settings)
    asked = asked_of(source.rows) if turns is None and source.rows else None
    return Reading(settings, turns, context and min(context, MOST_CONTEXT), asked)


def modelfile(name: str, reading: Reading, adds_bos: bool) -> tuple[str, list[str]]:
    """The Modelfile's text, and notes. adds_bos: whether the GGUF has llama.cpp put a BOS in front of every text."""
    template, notes = template_text(reading, adds_bos)
    lines = [f"# Written by qlora {__version__}. Use: ollama create {name} -f Modelfile"]
    lines += [f"# note: {note}" for note in notes]
    lines += [f"FROM ./{MODEL}", f'TEMPLATE """{template}"""']
    if reading.context:
        lines.append(f"PARAMETER num_ctx {reading.context}")
    lines += [f"PARAMETER stop {quoted(stop)}" for stop in reading.settings.stops]
    return "\n".join(lines) + "\n", notes


def template_text(reading: Reading, adds_bos: bool) -> tuple[str, list[str]]:
    """The Go template, without the BOS that llama.cpp writes itself, and notes on what it cannot say."""
    settings, turns = reading.settings, reading.turns
    bos = settings.special.get("bos_token", "")
    if turns is None:
        text, note = plain_text(reading.asked)
        return (bos if settings.bos and not adds_bos else "") + text, [note]
    notes = [f"the training template does what Ollama's cannot: {what}" for what in turns.untold]
    if (START, "system") not in turns.between:
        notes.append("the training template has no place for a system text: Ollama stops with an error at one")
    if settings.is_dated:
        notes.append(f"the training template prints today's date; the Modelfile says {settings.today} for good")
    between = turns.between
    if adds_bos and bos:
        between, had = without_bos(between, bos)
        if not had:
            notes.append(f"llama.cpp puts {bos} in front, which the training template does not")
    return go_template(Turns(between)), notes


def plain_text(asked: Asked | None) -> tuple[str, str]:
    """The Go template of a model without a chat template, and the note on it."""
    none = "the model has no chat template: what is asked goes"
    if asked is None:
        return VERBATIM, f"{none} to it as it is"
    if asked.around is None:
        what = f"to it as it is, without the prompt that its training rows had ({asked.name})"
        return VERBATIM, f"{none} {what}: write that into the Modelfile's TEMPLATE"
    before, behind = asked.around
    if not before + behind:
        return VERBATIM, f"{none} to it as it is, as its training rows were"
    return literal(before) + VERBATIM + literal(behind), f"{none} into the prompt of its training rows ({asked.name})"


def without_bos(between: Between, bos: str) -> tuple[Between, bool]:
    """The turns without the BOS at the start of a conversation, and whether all starts had it."""
    starts = [text for (before, _role), text in between.items() if before == START]
    cut = {pair: text.removeprefix(bos) if pair[0] == START else text for pair, text in between.items()}
    return cut, all(text.startswith(bos) for text in starts)


def quoted(stop: str) -> str:
    """A stop token as a value in a Modelfile, which knows no escapes. Raises UserError where it cannot be written."""
    if '"' in stop or not _is_one_line(stop):
        raise UserError("PARAMETER stop", f"a Modelfile cannot say {stop!r}", "serve the GGUF otherwise", Exit.REFUSED)
    return f'"{stop}"'


def _is_one_line(text: Collection[str]) -> bool:
    return all(char.isprintable() for char in text)


def adds_bos(model: Path) -> bool:
    """Whether a GGUF file tells llama.cpp to put a BOS in front of every text."""
    from gguf import GGUFReader

    found = GGUFReader(model).fields.get("tokenizer.ggml.add_bos_token")
    assert found is not None, "llama.cpp would decide by the kind of tokenizer"
    return bool(found.contents())
