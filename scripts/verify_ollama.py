"""Exported templates in Go's own text/template, and Modelfiles through Ollama's rules: compared with Jinja.

    bash scripts/verify_ollama.sh TEMPLATES

For every template of the folder: all orders of roles up to six turns, answers that have begun too. Prints what
docs/export.md says; exit code 1 where a text differs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qlora_cli.data.chat import Chat
from qlora_cli.data.conversations import Message, assistant
from qlora_cli.errors import UserError
from qlora_cli.export.go_template import go_template
from qlora_cli.export.ollama import Reading, modelfile, template_text
from qlora_cli.export.turns import Turns, find_turns
from scripts.template_verdicts import KWARGS, chat_of, templates

TEXTS = ("Asks β 🤗 {{ x }}", "a\nb", 'q"""', "x\u00a0x\u200bx")
ROLES = ("system", "user", "assistant")
LONGEST = 6

Case = tuple[tuple[str, ...], list[Message], str | None]
"""Roles, messages, and what Jinja writes for them; None where it stops."""


def orders(longest: int) -> list[tuple[str, ...]]:
    """All orders of roles, no role twice in a row, that an answer may follow."""
    every: list[tuple[str, ...]] = [()]
    found: list[tuple[str, ...]] = []
    for _ in range(longest):
        every = [(*order, role) for order in every for role in ROLES if order[-1:] != (role,)]
        found += [order for order in every if order[-1] != "assistant"]
    return found


def cases_of(chat: Chat) -> list[Case]:
    """Conversations with Jinja's text, each that ends with the user with a begun answer too."""
    found: list[Case] = []
    for roles in orders(LONGEST):
        messages: list[Message] = [{"role": role, "content": TEXTS[at % len(TEXTS)]} for at, role in enumerate(roles)]
        try:
            wanted: str | None = chat.render(messages, "", add_generation_prompt=True)
        except UserError:
            wanted = None
        found.append((roles, messages, wanted))
        if roles[-1] == "user":
            begun = None if wanted is None else wanted + "Begin"
            found.append(((*roles, "assistant"), [*messages, assistant("Begin")], begun))
    return found


def compare(program: Path, turns: Turns, cases: list[Case]) -> tuple[Counter[str], list[str]]:
    """How Go's texts stand to Jinja's, and the conversations that should be equal and are not."""
    template = go_template(turns)
    lines = [json.dumps({"template": template, "messages": messages}) for _, messages, _ in cases]
    done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
    counts, wrong = Counter[str](), []
    for (roles, _, wanted), line in zip(cases, done.stdout.splitlines(), strict=True):
        answer = json.loads(line)
        if wanted is None:
            kind = "both stop" if "error" in answer else "Jinja stops, Go writes"
        elif "error" in answer:
            kind = "Go stops, Jinja writes"
        else:
            kind = "equal" if answer["text"] == wanted else "DIFFERENT"
        counts[kind] += 1
        usual = "system" not in roles and roles[0] == "user"
        if kind == "DIFFERENT" or (usual and kind not in ("equal", "both stop")):
            wrong.append(f"{kind}: {', '.join(roles)}")
    return counts, wrong


def modelfiles(program: Path, chat: Chat, turns: Turns) -> list[str]:
    """What comes out of the Modelfiles otherwise than it went in."""
    wrong = []
    reading = Reading(chat.settings, turns, 512)
    for adds_bos in (False, True):
        text, _ = modelfile("mine", reading, adds_bos)
        done = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
        found = [(one["Name"], one["Args"]) for one in json.loads(done.stdout)]
        wanted = [("from", "./model.gguf"), ("template", template_text(reading, adds_bos)[0]), ("num_ctx", "512")]
        wanted += [("stop", stop) for stop in chat.settings.stops]
        if found != wanted:
            wrong.append(f"the Modelfile says {found}, not {wanted}"[:300])
    return wrong


def main(folder: Path, render: Path, parse: Path) -> int:
    """Compares all templates; 1 where something differs."""
    counts, wrong, silent, without_system = Counter[str](), list[str](), 0, 0
    found = templates(folder)
    for name, text in found.items():
        chat = chat_of(name, text, KWARGS.get(name.split("/")[1], {}))
        try:
            turns = find_turns(chat)
        except UserError as error:
            counts["templates refused"] += 1
            print(f"{name} is refused: {error.what}")
            continue
        told, apart = compare(render, turns, cases_of(chat))
        counts += told
        wrong += [f"{name}: {line}" for line in apart + modelfiles(parse, chat, turns)]
        notes = template_text(Reading(chat.settings, turns, 512), adds_bos=False)[1]
        silent += not notes
        without_system += any("no place for a system text" in note for note in notes)
    print(f"{len(found)} templates, {silent} need no note, {without_system} have no place for a system text")
    print("".join(f"{number:,} {kind}\n" for kind, number in counts.most_common()), end="")
    print("\n".join(wrong) or "no text differs, and every Modelfile comes out as it went in")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
