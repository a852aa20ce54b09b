"""What an exporter is given, and the files that it hands on; nothing heavy is imported, so that the help is quick."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.errors import Exit, UserError
from qlora_cli.merge.companions import TOKENIZER_FILES

if TYPE_CHECKING:
    from qlora_cli.recipe.schema import Source as Rows

MODEL_FILES = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES),
    *("README.md", "*.py"),
)
"""What makes a model folder; its merge.json, with paths of this machine, stays."""

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "base.json", *TOKENIZER_FILES, "README.md")
"""What makes an adapter folder; its manifest is written anew."""

BASE_LINE = re.compile(r"^base_model: (.*)\n", re.MULTILINE)
"""The base in the front matter of a card."""


@dataclass(frozen=True)
class Source:
    """What is exported: a model folder or an adapter folder.

    name:            of the run, else of the folder: what servers call it.
    base:            of an adapter: hub id or folder.
    base_folder:     of an adapter of a run: where its base lay in training.
    stored:          how the base was quantised while the adapter was trained, in a word.
    template_kwargs: data.chat_template_kwargs of the run.
    today:           what a template that prints the date gets.
    inputs:          folders that nothing may be written into.
    rows:            data.train of the run, whose rows have prompts around them where there is no template.
    places:          paths of this machine that a card loses.
    """

    folder: Path
    name: str
    base: str | None = None
    base_folder: Path | None = None
    stored: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    today: date = field(default_factory=date.today)
    inputs: tuple[Path, ...] = ()
    rows: tuple[Rows, ...] = ()
    places: tuple[str, ...] = ()


@dataclass(frozen=True)
class Order:
    """How it is exported. out: the new folder or file; file_type: of a GGUF; base_name: what the base is called."""

    out: Path
    file_type: str
    base_name: str | None
    say: Callable[[str], None]


@dataclass(frozen=True)
class Facts:
    """What an export made. told: facts for --json; notes: what people must know; commands: what to run next."""

    told: dict[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    commands: Sequence[str] = ()


def facts_of(written: dict[str, Any], notes: Sequence[str] = (), commands: Sequence[str] = ()) -> Facts:
    """The facts of a GGUF as its writer returns them, whose own notes come first."""
    told = {key: value for key, value in written.items() if key not in ("notes", "out")}
    return Facts(told, [*written.get("notes", ()), *notes], commands)


def refuse_place(out: Path, inputs: Iterable[Path]) -> None:
    """Refuses a place that has something in it, or lies in a folder that is exported. Nothing is overwritten."""
    for folder in inputs:
        if out.resolve().is_relative_to(folder.resolve()):
            raise UserError(out, f"lies in {folder}, which is exported", "name another place with --out", Exit.REFUSED)
    try:
        out.resolve().with_name(f".{out.resolve().name}.partial").lstat()  # the longest name that is made of it
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(out, "is too long a name for this disk", "name a shorter one with --out") from error
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
        raise UserError(out, "is there already, and nothing is overwritten", "name a new place with --out")


def files_of(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files directly in a folder that one of the patterns names, by name."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def hand_on(files: Iterable[Path], place: Path, places: Iterable[str] = ()) -> list[str]:
    """Puts the files into a folder: weights as hard links where that can be, the rest as copies.

    A README loses the `places`. Returns notes on what of this machine the files still name.
    """
    notes = []
    for file in files:
        target = place / file.name
        if file.suffix == ".md":
            write_card(target, without_places(_without_base(read_card(file)), places))
        elif file.suffix == ".safetensors":
            _link(file, target)
        else:
            shutil.copyfile(file, target)
        if file.suffix == ".json" and file.stat().st_size < 1_000_000:
            notes += [f"{file.name}: {key} is a path of this machine: {path}" for key, path in paths_in(file)]
    return notes


def _without_base(card: str) -> str:
    """The card without a base_model that is a path of this machine: a hub takes none that is not on it."""
    return BASE_LINE.sub(lambda line: "" if os.path.isabs(line[1]) else line[0], card, count=1)


def _link(file: Path, target: Path) -> None:
    """A hard link; a copy where the file system has none, or `target` is on another one."""
    try:
        os.link(file.resolve(), target)
    except OSError:
        shutil.copyfile(file, target)


def read_card(path: Path) -> str:
    """A text for people; bytes that are no UTF-8 come through to `write_card`."""
    return path.read_text(encoding="utf-8", errors="surrogateescape")


def write_card(path: Path, text: str) -> None:
    """Writes what `read_card` read."""
    path.write_text(text, encoding="utf-8", errors="surrogateescape")


def without_places(text: str, places: Iterable[str]) -> str:
    """The text with each of the paths shortened to its last part, our home to ~; what is below them stays.

    Only whole paths that are known: prose such as /v1/chat/completions has the form of one, and stays.
    """
    home = os.path.expanduser("~")
    known = {name for place in (*places, home) for name in (place.rstrip("/"), os.path.realpath(place)) if name > "/"}
    longest_first = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    homes = (home, os.path.realpath(home))
    return re.sub(
        rf"(?<![\w.-])({longest_first})(?![\w-]|\.\w)",
        lambda found: "~" if found[1] in homes else os.path.basename(found[1]),
        text,
    )


def places_in(value: Any) -> list[str]:
    """Every text in a JSON value that is a path from the root on."""
    if isinstance(value, dict | list):
        inside = value.values() if isinstance(value, dict) else value
        return [place for one in inside for place in places_in(one)]
    return [value] if isinstance(value, str) and os.path.isabs(value) else []


def paths_in(file: Path) -> list[tuple[str, str]]:
    """Top-level keys of a JSON file whose text is a path from the root on, with it."""
    try:
        values = json.loads(file.read_bytes())
    except ValueError:
        return []
    if not isinstance(values, dict):
        return []
    return [(key, value) for key, value in values.items() if isinstance(value, str) and os.path.isabs(value)]


def context_of(config: dict[str, Any]) -> int | None:
    """Tokens that the model reads, by its config.json; None where that does not say."""
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    found = [text.get(key) for key in ("max_position_embeddings", "n_positions", "n_ctx")] if text else []
    return next((value for value in found if isinstance(value, int)), None)


def task_of(config: dict[str, Any]) -> str:
    """The task of a model folder, by the class in its config.json; causal_lm where it names none."""
    named = str(next(iter(config.get("architectures") or ()), ""))
    heads = {"ForSequenceClassification": "sequence_classification", "ForQuestionAnswering": "question_answering"}
    heads |= {"ForConditionalGeneration": "seq2seq_lm"} if config.get("is_encoder_decoder") else {}
    return next((task for ending, task in heads.items() if named.endswith(ending)), "causal_lm")
