"""What becomes of conversations under the chat templates of a folder: prints docs/templates.md.

    python scripts/template_verdicts.py ../shared/data/templates > docs/templates.md

A new template is a file in the folder and a line of STOPS; nothing is downloaded.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from qlora_cli.data.chat import Chat, ChatSettings, make_chat
from qlora_cli.data.conversations import Conversation, Message, assistant, system, user
from qlora_cli.data.spans import render_row
from qlora_cli.errors import UserError

STOPS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("alpaca", "metharme", "mistral_v1", "mistral_v2v3", "mistral_v3_tekken"), ("</s>",)),
    **dict.fromkeys(("mistral_v7_tekken", "pixtral", "mistral-instruct", "llama-2-chat", "llava"), ("</s>",)),
    **dict.fromkeys(("amberchat", "saiga", "solar-instruct", "vicuna", "zephyr"), ("</s>",)),
    **dict.fromkeys(("aya", "cohere"), ("<|END_OF_TURN_TOKEN|>",)),
    **dict.fromkeys(("command_a", "command_a_rag", "command_a_tool_use"), ("<|END_OF_TURN_TOKEN|>",)),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), ("<｜end▁of▁sentence｜>",)),
    **dict.fromkeys(("exaone", "exaone4"), ("[|endofturn|]",)),
    **dict.fromkeys(("gemma", "gemma3", "gemma3n", "gemma-it"), ("<eos>", "<end_of_turn>")),
    **dict.fromkeys(("gemma4", "gemma4_unified"), ("<eos>", "<turn|>", "<|tool_response>")),
    **dict.fromkeys(("llama3", "llama3_2_vision", "llama-3-instruct"), ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")),
    **dict.fromkeys(("phi_3", "phi_35", "phi-3"), ("<|endoftext|>", "<|assistant|>", "<|end|>")),
    **dict.fromkeys(("qwen2_vl", "qwen_25", "qwen2.5-instruct"), ("<|im_end|>", "<|endoftext|>")),
    **dict.fromkeys(("qwen3", "qwen3_5"), ("<|im_end|>", "<|endoftext|>")),
    "chatml": ("<|im_end|>", "</s>"),
    "chatqa": ("<|end_of_text|>", "<|eot_id|>"),
    "falcon-instruct": ("<|endoftext|>",),
    "falcon_h1": ("<|end_of_text|>", "<|im_end|>"),
    "granite-3.0-instruct": ("<|end_of_text|>",),
    "jamba": ("<|endoftext|>", "<|eom|>"),
    "llama4": ("<|end_of_text|>", "<|eom|>", "<|eot|>"),
    "nemotron_h": ("</s>", "<|im_end|>"),
    "openchat-3.5": ("</s>", "<|end_of_turn|>"),
    "phi-3-small": ("<|endoftext|>", "<|end|>"),
    "phi_4": ("<|endoftext|>", "<|im_end|>"),
}
"""The models' EOS, then the other stop tokens of their generation config."""

KWARGS: dict[str, dict[str, Any]] = {name: {"enable_thinking": True} for name in ("gemma4", "gemma4_unified")}

_TURNS = [user("Asks beta"), assistant("Says gamma"), user("Asks delta"), assistant("Says epsilon")]
_RULES = system("Rules alpha")
PLAIN: dict[str, list[Message]] = {
    "one turn": _TURNS[:2],
    "turns": _TURNS,
    "six turns": [turn for n in range(6) for turn in (user(f"Asks {n}"), assistant(f"Says {n}"))],
    "a system text": [_RULES, *_TURNS[:2]],
    "a system text and turns": [_RULES, *_TURNS],
    "outer white space": [user("  Asks beta\n"), assistant("\n Says gamma \n\n"), user(" Asks\t"), assistant(" Says ")],
    "Unicode": [user("Fragt β 🤗"), assistant("Sagt 👩‍👩‍👧 é"), user("再问"), assistant("再说。")],
    "equal texts": [user("yes"), assistant("yes"), user("yes"), assistant("yes")],
}
"""The kinds of conversation that a verdict is about."""

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Finds a place",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_CALL = {"type": "function", "id": "call00001", "function": {"name": "look_up", "arguments": {"city": "Bern", "n": 2}}}
CALL: Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
RESULT: Message = {"role": "tool", "content": "Sunny zeta", "tool_call_id": "call00001", "name": "look_up"}
OTHER: dict[str, Conversation] = {
    "empty answer": Conversation([user("Asks beta"), assistant("")]),
    "reasoning": Conversation([_TURNS[0], {**_TURNS[1], "reasoning_content": "Thinks eta"}]),
    "tools": Conversation(_TURNS[:2], tools=[TOOL]),
    "tool calls": Conversation([_TURNS[0], CALL, RESULT, _TURNS[1]], tools=[TOOL]),
}


def templates(folder: Path) -> dict[str, str]:
    """The folder's templates, named collection/stem; chujiezheng's are indented for reading, as its README says."""
    paths = sorted(folder.glob("axolotl/*.jinja")) + sorted(folder.glob("chujiezheng/chat_templates/*.jinja"))
    found = {f"{path.relative_to(folder).parts[0]}/{path.stem}": path.read_text(encoding="utf-8") for path in paths}
    for name, text in found.items():
        if name.startswith("chujiezheng") and not name.endswith(("/qwen2.5-instruct", "/granite-3.0-instruct")):
            found[name] = text.replace("    ", "").replace("\n", "")
    return found


def chat_of(name: str, template: str, kwargs: dict[str, Any], today: date = date(2026, 1, 2)) -> Chat:
    """The template at work with the stop tokens of its family. The tokenizer knows no word: nothing is encoded."""
    stops = STOPS[name.split("/")[1]]
    settings = ChatSettings(
        tokenizer=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")).to_str(),
        template=template,
        called="",
        kwargs=kwargs,
        special={"bos_token": "<s>", "eos_token": stops[0]},
        bos=[],
        eos_id=0,
        unk_id=None,
        stops={stop: index for index, stop in enumerate(stops)},
        control=list(stops),
        today=today.isoformat(),
        train_on="completion",
    )
    return make_chat(settings)


def verdict(content: Conversation, chat: Chat) -> str:
    """'one row', 'one row per turn', or the reason for which the conversation is refused."""
    try:
        return "one row" if len(render_row(content, chat, "")) == 1 else "one row per turn"
    except UserError as error:
        return error.what.strip()


def verdicts(chat: Chat) -> dict[str, str]:
    """The verdict on every kind of conversation, those of PLAIN first."""
    plain = {kind: Conversation(messages) for kind, messages in PLAIN.items()}
    return {kind: verdict(content, chat) for kind, content in (plain | OTHER).items()}


def summary(found: dict[str, str]) -> str:
    """The verdict on a template: the weaker of those on PLAIN, apart from the kinds that it refuses."""
    taken = [found[kind] for kind in PLAIN if found[kind].startswith("one row")]
    if not taken:
        return f"refused: {found['one turn']}"
    return max(taken, key=len)


def table(folder: Path) -> str:
    """docs/templates.md."""
    lines, counts = [], Counter[str]()
    for name, template in templates(folder).items():
        kwargs = KWARGS.get(name.split("/")[1], {})
        found = verdicts(chat_of(name, template, kwargs))
        whole = summary(found).split(" (")[0]
        counts[whole.split(":")[0]] += 1
        needs = "".join(f", with `{key}: {str(value).lower()}`" for key, value in kwargs.items())
        stops = " ".join(f"`{stop}`" for stop in STOPS[name.split("/")[1]])
        refused = "" if whole.startswith("refused") else _refused(found)
        cells = (name, stops, whole + needs, _answer(found["tools"]), _answer(found["tool calls"]), refused)
        lines.append("".join("| " + cell.replace("|", "\\|") + " " for cell in cells) + "|")
    one, turn, none = (counts[kind] for kind in ("one row", "one row per turn", "refused"))
    return "\n".join([HEAD.format(number=len(lines), one=one, turn=turn, none=none), *lines, ""])


def _answer(found: str) -> str:
    return "yes" if found.startswith("one row") else "no"


def _refused(found: dict[str, str]) -> str:
    """The kinds of plain conversation, and the empty answer, that are refused, and why."""
    reasons: dict[str, list[str]] = {}
    for kind in (*PLAIN, "empty answer"):
        if not found[kind].startswith("one row"):
            reasons.setdefault(re.sub(r" of message \d+ \(\w+\)", "", found[kind]), []).append(kind)
    return "; ".join(f"{', '.join(kinds)}: {reason}" for reason, kinds in reasons.items())


HEAD = """# Chat templates

What becomes of a conversation under {number} published chat templates (axolotl's, and chujiezheng/chat_templates).
Written by `scripts/template_verdicts.py`; a test keeps it so, and others compare every trained character with
annotations written by hand.

- **one row**: the whole conversation is one row, all its answers are trained.
- **one row per turn**: one turn is one row; of several turns each answer becomes a row of its own behind the turns that
  lead to it, because the template writes earlier turns differently from the last one, or ends only the last.
- **with** a key: set it in `data.chat_template_kwargs`. Without it the template's prompt for an answer is not how it
  writes the answer in a conversation, and every row is refused.
- **refused**: no answer has an end that the model could learn. Nothing is guessed: use another template.

Tools: whether their descriptions are written. Calls: whether an answer may call one, arguments and result included.
Where the table says no, a row that has them is refused, as is any other row whose text the template drops, moves,
repeats or rewrites. So is `reasoning_content`, which these templates drop, with two exceptions: exaone4 writes it with
`skip_think: false` and `enable_thinking: true`, gemma4 before a call. (qwen3 here is axolotl's, whose prompt for an
answer ends otherwise than the answer begins.)

The stop tokens are those of the models' tokenizers and generation configs; with a model that has others the verdict is
another one. Of {number} templates {one} are proven in one row, {turn} with one row per turn, {none} are refused.

| template | stop tokens | conversations | tools | calls | but refused |
|---|---|---|---|---|---|"""

if __name__ == "__main__":
    sys.stdout.write(table(Path(sys.argv[1])))
