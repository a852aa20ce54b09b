"""A chat template as what stands between the texts of a conversation: found by rendering some, proven on others.

In most templates that depends on the two roles alone: who spoke before, and who speaks now. Templates in another
language than Jinja can say that much; what a template does beyond it is refused, or told in a note.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from qlora_cli.data.chat import Chat, ChatSettings, make_chat
from qlora_cli.data.confine import confine, cpu_limit
from qlora_cli.data.conversations import Message
from qlora_cli.data.pool import COMMAND
from qlora_cli.errors import Exit, UserError

START, END = "start", "end"
ROLES = ("system", "user", "assistant")
Between = dict[tuple[str, str], str]
"""What is written after a text of one role (or the start) and before one of another (or the end: the model's turn)."""

CORE = (("user",), ("user", "assistant", "user"))
FURTHER = (
    *(("system",), ("system", "user"), ("system", "assistant", "user"), ("assistant", "user")),
    *(("user", "system", "user"), ("user", "assistant", "system", "user")),
)
"""Conversations from which the texts between are read; a template must write the first two."""

OPTIONAL = (
    *(("user", "system"), ("assistant", "system"), ("system", "assistant"), (START, "assistant"), ("system", END)),
    *(("system", "user"), (START, "system")),
)
"""What a template need not write, the least wanted first."""

PLAIN = (
    ("Asks β 🤗 {{ x }}", "Says 'two'\nlines \"of\" text", "再问 {% y %}", "1. one\n2. two", "<b> & \\n"),
    ("yes",),
)
SPECIAL = {
    "white space around a text is taken off or moved": (" \n Asks beta \n\n",),
    "an empty text is left out": ("", "x", ""),
    "blank lines in a text are taken out": ("One\n\nTwo\n\n\nThree",),
    "the reasoning in earlier answers (<think>...</think>) is taken out": ("<think>\nwhy\n</think>\n\nyes",),
}
"""What some templates do with some texts, and texts that show it. That is no part of what is found here."""

LONGEST = 6
CPU_SECONDS, MEMORY_BYTES = 60.0, 1 << 30


@dataclass(frozen=True)
class Turns:
    """between: proven over all conversations of up to LONGEST turns; untold: what the template does beyond it."""

    between: Between
    untold: tuple[str, ...] = ()


def turns_of(settings: ChatSettings, cpu_seconds: float = CPU_SECONDS) -> Turns:
    """The template of the settings as turns, found in a process that may open no file and ends in good time.

    Raises UserError where the template is no such template.
    """
    command = [sys.executable, "-P", "-c", COMMAND.replace("data.worker", "export.turns")]
    done = subprocess.run(command, input=pickle.dumps((settings, cpu_seconds)), capture_output=True)
    if done.returncode:
        raise _death(settings, done.returncode, done.stderr.decode(errors="replace"), cpu_seconds)
    answer = json.loads(done.stdout)
    if "what" in answer:
        raise UserError(answer["where"], answer["what"], answer["todo"])
    return Turns({(before, role): text for before, role, text in answer["between"]}, tuple(answer["untold"]))


def _death(settings: ChatSettings, code: int, told: str, cpu_seconds: float) -> UserError:
    """Why the process ended: a limit that the template met, or what it said last."""
    memory = f"needs more than {MEMORY_BYTES // 2**20:,} MiB of memory"
    limits = {-signal.SIGABRT: memory, -signal.SIGSEGV: memory}
    limits[-signal.SIGPROF] = f"does not come to an end within {cpu_seconds:g} s of processor time"
    if code in limits:
        return UserError("data.chat_template", f"{settings.called} {limits[code]}", "use a simpler template")
    last = (told.strip().splitlines() or ["it said nothing"])[-1]
    what = f"the process that renders it ended with exit status {code}: {last}"
    return UserError(settings.called, what, "report this with the template", Exit.FAILED)


def main() -> None:
    """The process of turns_of: settings on stdin, the turns or what is wrong as JSON on stdout."""
    settings, cpu_seconds = pickle.loads(sys.stdin.buffer.read())
    confine(MEMORY_BYTES)
    try:
        with cpu_limit(cpu_seconds):
            turns = find_turns(make_chat(settings))
    except UserError as error:
        if isinstance(error.__cause__, MemoryError):
            os.abort()
        print(json.dumps({"where": error.where, "what": error.what, "todo": error.todo}))
        return
    print(json.dumps({"between": [[*pair, text] for pair, text in turns.between.items()], "untold": turns.untold}))


def find_turns(chat: Chat) -> Turns:
    """The chat's template as turns. Raises UserError where what it writes depends on more than neighbouring roles."""
    between: Between = {}
    for roles in (*CORE, *FURTHER):
        try:
            pieces = _pieces(chat, roles)
        except UserError:
            if roles in CORE:
                raise
            continue
        for pair, piece in zip(_pairs(roles), pieces, strict=True):
            between.setdefault(pair, piece)
    _prove(chat, between)
    return Turns(between, tuple(what for what, texts in SPECIAL.items() if not _holds(chat, between, texts)))


def written(between: Mapping[tuple[str, str], str], messages: Sequence[Message]) -> str:
    """What the turns say for a conversation, up to the place where the model answers."""
    before, parts = START, []
    for message in messages:
        parts += [between[before, message["role"]], message["content"]]
        before = message["role"]
    return "".join([*parts, between[before, END]])


def _prove(chat: Chat, between: Between) -> None:
    """Takes out of `between` what does not hold everywhere. Raises UserError where that is what must hold."""
    while (roles := _first_wrong(chat, between)) is not None:
        spared = [pair for pair in OPTIONAL if pair in _pairs(roles)]
        if not spared:
            what = "writes more than what two neighbouring roles decide, so it is no Ollama template"
            raise chat.refused(f"{what}: {', '.join(roles)} is written otherwise", "the chat template")
        del between[spared[0]]


def _first_wrong(chat: Chat, between: Between) -> tuple[str, ...] | None:
    """The shortest conversation of which every pair is known and the whole is written otherwise, or refused."""
    for roles in _conversations(LONGEST):
        if all(pair in between for pair in _pairs(roles)):
            for texts in PLAIN:
                messages = _messages(roles, texts)
                try:
                    same = _rendered(chat, messages) == written(between, messages)
                except UserError:
                    same = False
                if not same:
                    return roles
    return None


def _holds(chat: Chat, between: Between, texts: Sequence[str]) -> bool:
    """Whether the turns are right for these texts too, with a system text and without."""
    for roles in (*CORE, ("user", "assistant", "user", "assistant", "user"), ("system", "user")):
        if all(pair in between for pair in _pairs(roles)):
            messages = _messages(roles, texts)
            try:
                if _rendered(chat, messages) != written(between, messages):
                    return False
            except UserError:
                return False
    return True


def _conversations(longest: int) -> list[tuple[str, ...]]:
    """All orders of roles, no role twice in a row, that an answer may follow: the last one is no assistant's."""
    orders: list[tuple[str, ...]] = [()]
    found: list[tuple[str, ...]] = []
    for _length in range(longest):
        orders = [(*order, role) for order in orders for role in ROLES if order[-1:] != (role,)]
        found += [order for order in orders if order[-1] != "assistant"]
    return found


def _pairs(roles: Sequence[str]) -> list[tuple[str, str]]:
    return list(pairwise([START, *roles, END]))


def _messages(roles: Sequence[str], texts: Sequence[str]) -> list[Message]:
    return [{"role": role, "content": texts[at % len(texts)]} for at, role in enumerate(roles)]


def _rendered(chat: Chat, messages: list[Message]) -> str:
    return chat.render(messages, "the chat template", add_generation_prompt=True)


def _pieces(chat: Chat, roles: Sequence[str]) -> list[str]:
    """What a conversation's rendering has between its texts. Raises UserError where a text is not in it."""
    marks = [f"zeta{at}quux" for at in range(len(roles))]
    rest = _rendered(chat, _messages(roles, marks))
    pieces = []
    for mark, role in zip(marks, roles, strict=True):
        piece, found, rest = rest.partition(mark)
        if not found:
            raise chat.refused(f"does not write the {role}'s text where it stands", "the chat template")
        pieces.append(piece)
    return [*pieces, rest]
