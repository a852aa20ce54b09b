"""Kinds of conversation, and by hand why a published template must refuse some of them."""

from __future__ import annotations

from annotated_templates import ANNOTATED
from template_verdicts import CALL, PLAIN, RESULT, TOOL

from qlora_cli.data.conversations import Conversation, Message, assistant, system, user


def pairs(number: int) -> list[Message]:
    return [turn for n in range(number) for turn in (user(f"Asks {n}?"), assistant(f"Says\n{n}."))]


RULES = system("Rules alpha")
THINKS = {**assistant("Says gamma"), "reasoning_content": "Thinks eta"}
KINDS: dict[str, Conversation] = {
    **{f"turns {number}": Conversation(pairs(number)) for number in range(1, 7)},
    **{f"system {number}": Conversation([RULES, *pairs(number)]) for number in range(1, 7)},
    "system, outer space": Conversation([system(" R \n"), user(" Asks\t"), assistant("\nSays "), *pairs(1)]),
    **{kind: Conversation(PLAIN[kind]) for kind in ("outer white space", "Unicode", "equal texts")},
    "markup": Conversation([user("<b>{{ x }} [INST] 100%\\n"), assistant('{"a": "\\u00e9"}\n\n</b>\n  - x')]),
    "ends with a question": Conversation(pairs(2)[:3]),
    "first untrained": Conversation(pairs(3), trained=(False, False, False, True, False, True)),
    "empty untrained": Conversation([user("Asks"), assistant(""), *pairs(1)], trained=(False, False, False, True)),
    "empty question": Conversation([user(""), assistant("Says")]),
    "empty answer": Conversation([user("Asks"), assistant("")]),
    "empty answers": Conversation([user("Asks"), assistant(""), user("Asks"), assistant("")]),
    "two answers": Conversation([*pairs(1), assistant("Says more")]),
    "system in the middle": Conversation([*pairs(1), RULES, *pairs(1)]),
    "tools": Conversation(pairs(1), tools=[TOOL]),
    "system, tools": Conversation([RULES, *pairs(1)], tools=[TOOL]),
    "call": Conversation([user("Asks"), CALL], tools=[TOOL]),
    "call and result": Conversation([user("Asks"), CALL, RESULT, assistant("Says"), *pairs(1)], tools=[TOOL]),
    "reasoning": Conversation([user("Asks"), THINKS]),
    "reasoning in two turns": Conversation([user("Asks"), THINKS, user("Asks more"), THINKS]),
}


def named(collection: str, stems: str) -> set[str]:
    return {f"{collection}/{stem}" for stem in stems.split()}


NO_END = named("chujiezheng", "amberchat chatqa falcon-instruct solar-instruct") | {"axolotl/llava"}
MISTRAL = named("axolotl", "mistral_v2v3 mistral_v3_tekken")
ALTERNATING = MISTRAL | named("axolotl", "aya cohere gemma gemma3 gemma3n mistral_v1 pixtral")
ALTERNATING |= {name for name in ANNOTATED if name.startswith("chuj")} - named(
    "chujiezheng", "granite-3.0-instruct qwen2.5-instruct"
)
QWEN3 = named("axolotl", "qwen3 qwen3_5")
GEMMA4 = named("axolotl", "gemma4 gemma4_unified")
COMMAND = named("axolotl", "command_a command_a_rag command_a_tool_use")
CALLS = MISTRAL | QWEN3 | GEMMA4 | {"chujiezheng/qwen2.5-instruct"}
CALLS |= named("axolotl", "command_a_tool_use exaone4 jamba llama3_2_vision llama4 qwen_25")
TOOLS_ALONE = named("axolotl", "falcon_h1") | named("chujiezheng", "granite-3.0-instruct")
DROPS_LATER_SYSTEM = named("axolotl", "alpaca falcon_h1 metharme phi_4")
OTHER_PROMPT = "renders the prompt of message {} (assistant) differently within the whole conversation"


def refusal(name: str, kind: str) -> str | None:
    """Why the kind of conversation must be refused, or None."""
    if name in NO_END and kind in (
        "two answers",
        "system in the middle",
    ):  # refused in one row, and then row by row: the reason is the last's
        return "writes no end-of-turn token"
    if kind == "markup" and name == "chujiezheng/falcon-instruct":  # empty lines
        return "rewrites the text of message 2 (assistant)"
    if kind == "system, tools" and name == "axolotl/pixtral":
        return "drops the name of a tool"
    if "system" in kind and kind != "system in the middle":
        if name == "axolotl/gemma":
            return "stops with: System role not supported"
        if name in MISTRAL | {"axolotl/pixtral"}:  # written only where the last message is the user's
            return "drops the text of message 1 (system)"
    if kind in ("system in the middle", "two answers") and name in ALTERNATING:
        return "stops with: "  # roles must alternate, each in its own words
    if kind == "system in the middle":
        if name in DROPS_LATER_SYSTEM:
            return "drops the text of message 3 (system)"
        if name == "axolotl/nemotron_h":
            return "stops with: Unexpected role: system"
        if name == "axolotl/deepseek_v3":  # all of them in front
            return "moves message 3 (system)"
    if kind == "two answers" and name in QWEN3 | GEMMA4:
        return OTHER_PROMPT.format(3)
    if "call" in kind and name == "axolotl/deepseek_v3":  # its arguments are texts
        return 'stops with: can only concatenate str (not "dict") to str'
    if KINDS[kind].tools and name not in CALLS | TOOLS_ALONE:
        return "drops the name of a tool ('look_up')"
    if "call" in kind and name in TOOLS_ALONE:
        return "drops a tool call's name of message 2 (assistant)"
    if "reasoning" in kind:
        return OTHER_PROMPT.format(2) if name in QWEN3 else "drops the reasoning of message 2 (assistant)"
    if kind in ("empty answer", "empty answers") and name == "axolotl/exaone4":  # no <think> before it
        return OTHER_PROMPT.format(2)
    return "writes no end-of-turn token" if name in NO_END else None
