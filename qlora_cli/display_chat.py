"""The conversation on a terminal or in a pipe: replies on stdout as they come, all else on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from qlora_cli.chat.dialogue import Dialogue, as_json
from qlora_cli.chat.halt import halting
from qlora_cli.chat.reply import Reply, Say
from qlora_cli.chat.session import Session
from qlora_cli.data.rows import count
from qlora_cli.data.view import visible
from qlora_cli.errors import UserError

WIDE = 100
"""Columns of a terminal from which on two models answer side by side."""

Act = Callable[[Dialogue, Say], Reply]
"""What makes a dialogue's next reply."""


# ── --prompt ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_prompts(prompts: Sequence[str]) -> list[str]:
    """The texts of --prompt, `-` replaced by what stands on stdin. Raises UserError for two of these."""
    if sum(text == "-" for text in prompts) > 1:
        raise UserError("--prompt -", "is given twice, and stdin is read once", "leave one of them out")
    return [_stdin() if text == "-" else text for text in prompts]


def _stdin() -> str:
    """All of stdin, without the line break at its end."""
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError("--prompt -", f"stdin is no UTF-8 text: {error.reason}", "convert it") from error


def answer_prompts(session: Session, told: str, texts: Sequence[str], quiet: bool) -> dict[str, Any]:
    """Answers the texts as turns of one conversation, and gives the conversation with its figures.

    quiet: nothing is printed on stdout.
    """
    dialogues = dialogues_of(session, told)
    shown = _told if quiet else _side_by_side if _is_wide(dialogues) else _printed
    for text in texts:
        shown(dialogues, asking(text))
    found = [as_json(dialogue) for dialogue in dialogues]
    return found[0] if len(found) == 1 else {"models": found}


def asking(text: str) -> Act:
    """What has a text answered."""
    return lambda dialogue, say: dialogue.ask(text, say)


def dialogues_of(session: Session, told: str) -> list[Dialogue]:
    """A dialogue with each model, with the system's text if there is one."""
    dialogues = [Dialogue(session, speaker) for speaker in session.speakers]
    for dialogue in dialogues:
        dialogue.tell(told)
    return dialogues


# ── replies ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _told(dialogues: Sequence[Dialogue], act: Act) -> None:
    """The replies, unseen."""
    for dialogue in dialogues:
        act(dialogue, lambda text: None)
        _remark(dialogue)


def _printed(dialogues: Sequence[Dialogue], act: Act) -> None:
    """The replies one below the other, each under the model's name where there are two."""
    sees, said = sys.stdout.isatty(), False

    def say(text: str) -> None:
        nonlocal said
        said = True
        sys.stdout.write(visible(text) if sees else text)
        sys.stdout.flush()

    for dialogue in dialogues:
        said = False
        if len(dialogues) > 1:
            say(f"[{dialogue.speaker.name}]\n")
        try:
            act(dialogue, say)
            say("\n")
        except BaseException:
            if said:  # what follows begins a line of its own
                say("\n")
            raise
        _remark(dialogue)


def _side_by_side(dialogues: Sequence[Dialogue], act: Act) -> None:
    """The replies in columns; the second is written when the first is done."""
    texts = [""] * len(dialogues)

    def table() -> Table:
        columns = Table(box=None, expand=True, pad_edge=False, padding=(0, 2, 0, 0))
        for dialogue in dialogues:
            columns.add_column(dialogue.speaker.name, ratio=1, overflow="fold")
        columns.add_row(*map(Text, texts))
        return columns

    with Live(table(), console=Console(highlight=False), refresh_per_second=12) as live:
        for at, dialogue in enumerate(dialogues):

            def say(text: str, at: int = at) -> None:
                texts[at] += visible(text)
                live.update(table())

            act(dialogue, say)
    for dialogue in dialogues:
        _remark(dialogue)


def _is_wide(dialogues: Sequence[Dialogue]) -> bool:
    return len(dialogues) > 1 and sys.stdout.isatty() and Console().width >= WIDE


def _remark(dialogue: Dialogue) -> None:
    """What a reader has to know of the last reply, on stderr."""
    if dialogue.lost:
        few = ", ".join(map(repr, dialogue.lost[:5]))
        _note(f"{count(len(dialogue.lost), 'character')} lost, the tokenizer cannot write them: {few}")
    if cut := dialogue.cut():
        _note(cut)


def _note(text: str) -> None:
    print(f"note     {visible(text)}", file=sys.stderr, flush=True)


# ── interactive ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Command:
    """What a line that begins with a slash does. act: takes the dialogues and what follows the command's name."""

    words: str
    act: Callable[[list[Dialogue], str], None]
    takes: str = ""


def _reset(dialogues: list[Dialogue], rest: str) -> None:
    for dialogue in dialogues:
        dialogue.reset()


def _system(dialogues: list[Dialogue], rest: str) -> None:
    for dialogue in dialogues:
        dialogue.tell(rest)


def _save(dialogues: list[Dialogue], rest: str) -> None:
    if not rest:
        raise UserError("/save", "names no file", "write /save rows.jsonl")
    dialogue = dialogues[-1]  # of two models the adapter's
    dialogue.save(Path(rest))
    _note(f"the conversation with {dialogue.speaker.name} is in {rest}")
    if any(reply.stopped != "stop token" for reply in dialogue.replies):
        _note("a reply in it was cut: finish it, or remove it, before you train on the row")


def _regenerate(dialogues: list[Dialogue], rest: str) -> None:
    _reply(dialogues, lambda dialogue, say: dialogue.again(say))


def _help(dialogues: list[Dialogue], rest: str) -> None:
    for name, command in COMMANDS.items():
        print(f"  {f'{name} {command.takes}':<16} {command.words}", file=sys.stderr)
    print('  A \\ at the end of a line, or """ around several, continues a text; // begins one with a slash.\n'
          "  Ctrl-C ends a reply, and at the prompt the program; so does Ctrl-D.", file=sys.stderr)  # fmt: skip


def _quit(dialogues: list[Dialogue], rest: str) -> None:
    raise EOFError


COMMANDS = {
    "/reset": Command("begin a new conversation; the system's text stays", _reset),
    "/system": Command("set the system's text and begin anew; none takes it away", _system, "TEXT"),
    "/regenerate": Command("answer the last text again", _regenerate),
    "/save": Command("write the conversation to a new file, as rows that `qlora train` takes", _save, "FILE"),
    "/help": Command("show this", _help),
    "/quit": Command("end", _quit),
}


def converse(session: Session, told: str) -> bool:
    """Reads texts and commands until the input ends; returns whether Ctrl-C ended it.

    On a terminal a mistake is told and the conversation goes on; in a pipe it is raised.
    """
    dialogues = dialogues_of(session, told)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        import readline  # noqa: F401 (gives input() its history and its editing)

        print("Write something; /help lists the commands.", file=sys.stderr)
    elif isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # what is no text is refused by its name
    while True:
        try:
            _turn(dialogues, _read("> " if is_terminal else ""))
        except EOFError:
            return False
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return True
        except UserError as error:
            if not is_terminal:
                raise
            print(visible(str(error)), file=sys.stderr)


def _turn(dialogues: list[Dialogue], text: str) -> None:
    """Does what a text or a command asks for. Raises EOFError at the end, and UserError for an unknown command."""
    if text.startswith("/") and not text.startswith("//"):
        name, _, rest = text.partition(" ")
        if name not in COMMANDS:
            raise UserError(name, "no such command", "see /help; two slashes begin a text with one")
        COMMANDS[name].act(dialogues, rest.strip())
    elif text.strip():
        text = text.removeprefix("/") if text.startswith("//") else text
        _reply(dialogues, asking(text))


def _reply(dialogues: list[Dialogue], act: Act) -> None:
    """The replies, of which Ctrl-C ends the one that is being written."""

    def one(dialogue: Dialogue, say: Say) -> Reply:
        with halting(dialogue.session.manner.halt):
            return act(dialogue, say)

    (_side_by_side if _is_wide(dialogues) else _printed)(dialogues, one)


def _read(prompt: str) -> str:
    """The next text: a line, lines that end with a backslash, or what stands between two triple quotes.

    A backslash at the input's end continues with nothing. Raises EOFError where the input is at its end, and UserError
    where it ends between the quotes: what was meant as commands may be in there.
    """
    more = "." * (len(prompt) - 1) + " " if prompt else ""
    line = input(prompt)
    try:
        if line.startswith('"""'):
            text = line[3:]
            while not text.rstrip().endswith('"""'):
                text += "\n" + input(more)
            return text.rstrip()[:-3].strip("\n")
        while line.endswith("\\"):
            line = line[:-1]
            line += "\n" + input(more)
    except EOFError:
        if line.startswith('"""'):
            raise UserError("the text", 'has no """ at its end', 'close it with """') from None
    return line
