"""What each published chat template writes, by hand, with the trained characters between ⟦ and ⟧.

Derived from reading the templates, not from running them and not from data/spans.py. Only long fixed texts (preambles,
lists of instructions) are read out of the template's file as literals: they hold no decision.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from qlora_cli.data.conversations import Message

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from template_verdicts import templates

FOLDER = Path(__file__).parents[3] / "shared/data/templates"
TEXTS = templates(FOLDER)
TODAY = date(2026, 1, 2)
Tools = list[dict[str, Any]] | None
Write = Callable[[list[Message], Tools], str]


@dataclass(frozen=True)
class Annotated:
    """A template by hand. write: its text for messages and tools.

    per_turn: of several answers only the last one is written as the model is to write it, so each needs its own row.
    """

    write: Write
    per_turn: bool = False


def literal(name: str, beginning: str) -> str:
    """The last fixed text of the template that begins so: a string constant, or text outside of tags."""
    return next(text for text in reversed(_literals(name)) if text.startswith(beginning))


@cache
def _literals(name: str) -> list[str]:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    tokens = environment.lex(TEXTS[name])
    return [
        ast.literal_eval(value.replace("\n", "\\n")) if kind == "string" else value
        for _, kind, value in tokens
        if kind in ("string", "data")
    ]


def frames(
    user: str, assistant: str, system: str = "", *, start: str = "", default: str = "", strip: str = "", name: str = ""
) -> Annotated:
    """A frame for each role, `{}` for its text. strip: roles whose text is trimmed, by their first letters.

    start stands in front; default where the first message is not the system's; name: the template holds the default.
    """
    by_role = {"user": user, "assistant": assistant, "system": system}

    def write(messages: list[Message], tools: Tools) -> str:
        text = start
        if messages[0]["role"] != "system":
            text += system.replace("{}", literal(name, default)) if name else default
        for message in messages:
            content = message["content"].strip() if message["role"][0] in strip else message["content"]
            text += by_role[message["role"]].replace("{}", content)
        return text

    return Annotated(write)


def merged(
    user: str, assistant: str, system: str, *, start: str = "", strip: str = "", jointly: bool = False
) -> Annotated:
    """As frames, but the system's text stands in the first user's frame. jointly: both are trimmed as one text."""

    def write(messages: list[Message], tools: Tools) -> str:
        text, before = start, ""
        for message in messages:
            content = message["content"].strip() if message["role"][0] in strip else message["content"]
            if message["role"] == "system":
                before = system.replace("{}", content)
                continue
            content, before = before + content, ""
            frame = user if message["role"] == "user" else assistant
            text += frame.replace("{}", content.strip() if jointly else content)
        return text

    return Annotated(write)


# ── families with tools ──────────────────────────────────────────────────────────────────────────────────────────────


def to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def calls_of(message: Message) -> list[dict[str, Any]]:
    return [call["function"] for call in message.get("tool_calls", ())]


def qwen_25(name: str) -> Annotated:
    def write(messages: list[Message], tools: Tools) -> str:
        first = messages[0]["role"] == "system"
        rules = (
            messages[0]["content"] if first else "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        )
        text = f"<|im_start|>system\n{rules}{_qwen_tools(name, tools, blank=True)}<|im_end|>\n"
        for message in messages[first:]:
            role, content = message["role"], message["content"]
            calls = [f"<tool_call>\n{_qwen_call(call)}\n</tool_call>" for call in calls_of(message)]
            if role == "tool":
                text += f"<|im_start|>user\n<tool_response>\n{content}\n</tool_response><|im_end|>\n"
            elif role == "assistant":
                answer = "\n".join([content, *calls]) if content or not calls else "\n".join(calls)
                text += f"<|im_start|>assistant\n⟦{answer}<|im_end|>⟧\n"
            else:
                text += f"<|im_start|>{role}\n{content}<|im_end|>\n"
        return text

    return Annotated(write)


def _qwen_call(function: dict[str, Any]) -> str:
    return '{"name": "' + function["name"] + '", "arguments": ' + to_json(function["arguments"]) + "}"


def _qwen_tools(name: str, tools: Tools, blank: bool) -> str:
    if not tools:
        return ""
    head = literal(name, "\n\n# Tools" if blank else "# Tools")
    tail = literal(name, "\n</tools>").removesuffix("<|im_end|>\n")
    return head + "".join("\n" + to_json(tool) for tool in tools) + tail


def qwen_3(name: str) -> Annotated:
    """The prompt ends in <think> and a blank line; only the row's last answer behind its last question has one."""

    def write(messages: list[Message], tools: Tools) -> str:
        text, rest = "", messages
        rules = messages[0]["content"] if messages[0]["role"] == "system" else None
        if rules is not None:
            rest = messages[1:]
        if tools:
            text += f"<|im_start|>system\n{'' if rules is None else rules + chr(10) * 2}"
            text += f"{_qwen_tools(name, tools, blank=False)}<|im_end|>\n"
        elif rules is not None:
            text += f"<|im_start|>system\n{rules}<|im_end|>\n"
        for message in rest:
            role, content = message["role"], message["content"]
            if role == "tool":
                text += f"<|im_start|>user\n<tool_response>\n{content}\n</tool_response><|im_end|>\n"
            elif role != "assistant":
                text += f"<|im_start|>{role}\n{content}<|im_end|>\n"
            else:
                last = message is messages[-1]
                calls = "\n".join(f"<tool_call>\n{_qwen_call(call)}\n</tool_call>" for call in calls_of(message))
                calls = "\n" + calls if calls and content else calls
                answer = f"⟦</think>\n\n{content.lstrip(chr(10))}{calls}<|im_end|>⟧" if last else ""
                written = f"<think>\n\n{answer}" if last else f"{content}{calls}<|im_end|>"
                text += f"<|im_start|>assistant\n{written}\n"
        return text

    return Annotated(write, per_turn=True)


def exaone4(messages: list[Message], tools: Tools) -> str:
    name = "axolotl/exaone4"
    listing = ""
    if tools:
        listing = literal(name, "# Available Tools") + literal(name, "\nYou can use none, one")
        listing += literal(name, "\nHere are the tools") + "".join(f"<tool>{to_json(tool)}</tool>\n" for tool in tools)
        listing += literal(name, "\nFor each function call") + literal(name, '\n<tool_call>{"name": function_1')
        listing += literal(name, '\n<tool_call>{"name": function_2') + literal(name, "\nNote that if no")
    text = ""
    if messages[0]["role"] == "system":
        blank = "\n\n" if tools else ""
        text = f"[|system|]\n{messages[0]['content']}{blank}{listing}[|endofturn|]\n"
    elif tools:
        text = f"[|system|]\n{listing}[|endofturn|]\n"
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "tool":
            text += '[|tool|]\n<tool_result>{"result": ' + to_json(content) + "}</tool_result>[|endofturn|]\n"
        elif role == "assistant":
            calls = "\n".join(f"<tool_call>{_qwen_call(call)}</tool_call>" for call in calls_of(message))
            calls = "\n" + calls if calls and content else calls
            think = "<think>\n\n</think>\n\n" if content or calls else ""
            text += f"[|assistant|]\n{think}⟦{content}{calls}[|endofturn|]⟧\n"
        elif role == "user" or number:
            text += f"[|{role}|]\n{content}[|endofturn|]\n"
    return text


def llama_tools(name: str, messages: list[Message], tools: Tools) -> tuple[str, list[Message]]:
    """The first user's turn with the tools in front, and the messages that are left."""
    if not tools:
        return "", messages
    text = literal(name, "Given the following functions") + literal(name, "with its proper arguments")
    text += literal(name, "Respond in the format") + literal(name, "Do not use variables")
    text += "".join(to_json(tool, indent=4) + "\n\n" for tool in tools)
    return text + messages[0]["content"].strip(), messages[1:]


def llama3_2(messages: list[Message], tools: Tools) -> str:
    rules, rest = _rules(messages)
    text = "<s><|start_header_id|>system<|end_header_id|>\n\n" + ("Environment: ipython\n" if tools else "")
    text += f"Cutting Knowledge Date: December 2023\nToday Date: {TODAY:%d %b %Y}\n\n{(rules or '').strip()}<|eot_id|>"
    first, rest = llama_tools("axolotl/llama3_2_vision", rest, tools)
    if tools:
        text += f"<|start_header_id|>user<|end_header_id|>\n\n{first}<|eot_id|>"
    for message in rest:
        role, content = message["role"], message["content"]
        if role == "tool":
            text += f"<|start_header_id|>ipython<|end_header_id|>\n\n{to_json(content)}<|eot_id|>"
        elif role != "assistant":
            text += f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"
        else:
            answer = "".join(_llama_call(call) for call in calls_of(message)) or content
            text += f"<|start_header_id|>assistant<|end_header_id|>\n\n⟦{answer}<|eot_id|>⟧"
    return text


def llama4(messages: list[Message], tools: Tools) -> str:
    rules, rest = _rules(messages)
    text = "<s>"
    if rules is not None:
        environment = "Environment: ipython\n" if tools else ""
        text += f"<|header_start|>system<|header_end|>\n\n{environment}{rules.strip()}<|eot|>"
    first, rest = llama_tools("axolotl/llama4", rest, tools)
    if tools:
        text += f"<|header_start|>user<|header_end|>\n\n{first}<|eot|>"
    for message in rest:
        role, content = message["role"], message["content"]
        if role == "tool":
            text += f"<|header_start|>ipython<|header_end|>\n\n{to_json(content)}<|eot|>"
        elif role != "assistant":
            text += f"<|header_start|>{role}<|header_end|>\n\n{content}<|eot|>"
        else:
            calls = "".join(_llama_call(call) for call in calls_of(message))
            answer = f"<|python_start|>{content}<|python_end|>{calls}" if calls else content
            text += f"<|header_start|>assistant<|header_end|>\n\n⟦{answer}<|eot|>⟧"
    return text


def _llama_call(function: dict[str, Any]) -> str:
    return '{"name": "' + function["name"] + '", "parameters": ' + to_json(function["arguments"]) + "}"


def _rules(messages: list[Message]) -> tuple[str | None, list[Message]]:
    """The text of a system message at the beginning, and the others."""
    return (messages[0]["content"], messages[1:]) if messages[0]["role"] == "system" else (None, messages)


def mistral_tools(space: str, space_answer: str, trim: bool) -> Annotated:
    """v2/v3 and its Tekken successor; the system's text stands in the last user's turn if nothing follows it."""

    def write(messages: list[Message], tools: Tools) -> str:
        text = "<s>"
        users = [message for message in messages if message["role"] == "user"]
        for message in messages:
            role, content = message["role"], message["content"]
            calls = message.get("tool_calls")
            if role == "user":
                if tools and message == users[-1]:
                    functions = ", ".join(to_json(tool) for tool in tools)
                    text += f"[AVAILABLE_TOOLS]{space}[{functions}][/AVAILABLE_TOOLS]"
                text += f"[INST]{space}{content}[/INST]"
            elif role == "tool":
                identity = message["tool_call_id"]
                text += f'[TOOL_RESULTS]{space}{{"content": {content}, "call_id": "{identity}"}}[/TOOL_RESULTS]'
            elif calls:
                written = ", ".join(to_json({**call["function"], "id": call["id"]}) for call in calls)
                text += f"⟦[TOOL_CALLS]{space}[{written}]</s>⟧"
            else:
                text += f"⟦{space_answer}{content.strip() if trim else content}</s>⟧"
        return text

    return Annotated(write)


def jamba(messages: list[Message], tools: Tools) -> str:
    rules, rest = _rules(messages)
    text = f"<|startoftext|><|bom|><|system|> {rules or ''}"
    if tools:
        text += "\n\n" if rules else ""
        functions = "".join("\n\n" + to_json(tool["function"], indent=2) for tool in tools)
        text += f"<tool_definitions>\n# Tools\n\n## Functions{functions}\n</tool_definitions>"
    text += "<|eom|>"
    for message in rest:
        role, content = message["role"], message["content"]
        name = f"({message['name']})" if "name" in message else ""
        if role == "assistant":
            calls = ",\n".join(_qwen_call(call) for call in calls_of(message))
            content += f"<tool_calls>[\n    {calls}\n]</tool_calls>" if calls else ""
            text += f"<|bom|><|assistant|>⟦ {content}<|eom|>⟧"
        else:
            text += f"<|bom|><|{role}|> {name}{content}<|eom|>"
    return text


def gemma4(messages: list[Message], tools: Tools) -> str:
    """With enable_thinking: true. Tools: the one of template_verdicts. A call ends where its result begins."""
    rules, rest = _rules(messages)
    text = f"<s><|turn>system\n<|think|>\n{(rules or '').strip()}"
    if tools:
        text += '<|tool>declaration:look_up{description:<|"|>Finds a place<|"|>,parameters:{properties:{city:{type:'
        text += '<|"|>STRING<|"|>}},required:[<|"|>city<|"|>],type:<|"|>OBJECT<|"|>}}<tool|>'
    text += "<turn|>\n"
    open_turn = False
    for message in rest:
        role, content = message["role"], message["content"].strip()
        if role == "tool":
            text += f'response:look_up{{value:<|"|>{content}<|"|>}}<tool_response|>'
        elif role == "assistant":
            text += "" if open_turn else "<|turn>model\n"
            if calls := calls_of(message):
                assert calls[0]["arguments"] == {"city": "Bern", "n": 2}
                text += '⟦<|tool_call>call:look_up{city:<|"|>Bern<|"|>,n:2}<tool_call|><|tool_response>⟧'
            else:
                text += f"⟦{content}<turn|>⟧\n"
            open_turn = bool(calls)
        else:
            text += f"<|turn>{role}\n{content}<turn|>\n"
    return text


def command_a(name: str) -> Annotated:
    """<|START_RESPONSE|> is in the prompt of command_a alone; every row ends with the head of one more answer."""
    whole = name.endswith("command_a")
    turn, end = "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"

    def write(messages: list[Message], tools: Tools) -> str:
        text = "<s>"
        if whole:
            text += literal(name, f"{turn}<|SYSTEM_TOKEN|># System") + literal(name, "You are in contextual")
            text += literal(name, "\n\nYour information cutoff")
        else:
            text += literal(name, f"{turn}<|SYSTEM_TOKEN|># System")
            text += _command_tools(name, tools) + literal(name, "# Default Preamble")
        rules, rest = _rules(messages)
        text += (literal(name, "\n\n# Developer Preamble") + rules if rules else "") + end
        calls = 0
        for message in rest:
            role, content = message["role"], message["content"]
            if role == "tool":
                text += (
                    f'{turn}<|SYSTEM_TOKEN|><|START_TOOL_RESULT|>[\n    {{\n        "tool_call_id": "{calls - 1}",\n'
                )
                text += f'        "results": {{\n            "0": {to_json(content)}\n        }},\n'
                text += f'        "is_error": null\n    }}\n]<|END_TOOL_RESULT|>{end}'
            elif called := calls_of(message):
                (call,) = called
                text += f"{turn}<|CHATBOT_TOKEN|>⟦<|START_THINKING|><|END_THINKING|><|START_ACTION|>[\n    "
                text += f'{{"tool_call_id": "{calls}", "tool_name": "{call["name"]}", '
                text += f'"parameters": {to_json(call["arguments"])}}}\n]<|END_ACTION|>{end}⟧'
                calls += 1
            elif role == "assistant":
                begin = "<|START_RESPONSE|>⟦" if whole else "⟦<|START_RESPONSE|>"
                text += f"{turn}<|CHATBOT_TOKEN|>{begin}{content}<|END_RESPONSE|>{end}⟧"
            else:
                text += f"{turn}<|{role.upper()}_TOKEN|>{content}{end}"
        return text + f"{turn}<|CHATBOT_TOKEN|>"

    return Annotated(write)


def _command_tools(name: str, tools: Tools) -> str:
    if not tools:
        return ""
    text = literal(name, "\nYou have been trained to have") + literal(name, "\n## Available Tools")
    for tool in tools:
        function = tool["function"]
        text += f'    {{"name": "{function["name"]}", "description": "{function["description"]}", '
        text += f'"parameters": {to_json(function["parameters"])}, "responses": null}}\n'
    return text + literal(name, "]\n```")


def falcon_h1(messages: list[Message], tools: Tools) -> str:
    rules, rest = _rules(messages)
    text = "<s>"
    if tools:
        name = "axolotl/falcon_h1"
        text += f"<|im_start|>system\n{'' if rules is None else rules + chr(10) * 2}"
        text += literal(name, "You are a function calling") + "".join(f"[{to_json(tool)}]" for tool in tools)
        text += literal(name, "\n</tools>")  # and no end of turn
    elif rules is not None:
        text += f"<|im_start|>system\n{rules}<|im_end|>\n"
    for message in rest:
        answer = (
            f"⟦{message['content']}<|im_end|>⟧" if message["role"] == "assistant" else message["content"] + "<|im_end|>"
        )
        text += f"<|im_start|>{message['role']}\n{answer}\n"
    return text


def granite(messages: list[Message], tools: Tools) -> str:
    text = ""
    if tools:
        functions = "\n\n".join(to_json(tool, indent=4) for tool in tools)
        text = f"<|start_of_role|>available_tools<|end_of_role|>\n{functions}<|end_of_text|>\n"
    for message in messages:
        end = f"{message['content']}<|end_of_text|>"
        end = f"⟦{end}⟧" if message["role"] == "assistant" else end
        text += f"<|start_of_role|>{message['role']}<|end_of_role|>{end}\n"
    return text


# ── others of their own ──────────────────────────────────────────────────────────────────────────────────────────────


def alpaca(messages: list[Message], tools: Tools) -> str:
    headings = {"system": "{}", "user": "### Instruction:\n{}", "assistant": "### Response:\n⟦{}</s>⟧"}
    return "<s>" + "\n\n".join(headings[message["role"]].replace("{}", message["content"]) for message in messages)


def deepseek_v3(messages: list[Message], tools: Tools) -> str:
    heads = {"user": "<｜User｜>{}", "assistant": "<｜Assistant｜>⟦{}<｜end▁of▁sentence｜>⟧", "system": "{}"}
    return "<s>" + "".join(heads[message["role"]].replace("{}", message["content"]) for message in messages)


def metharme(messages: list[Message], tools: Tools) -> str:
    """No answer but the last one has an end."""
    rules, rest = _rules(messages)
    text = "<s><|system|>" + (literal("axolotl/metharme", "Enter RP mode") if rules is None else rules)
    for message in rest:
        content = message["content"].strip()
        if message is messages[-1] and message["role"] == "assistant":
            return f"{text}<|model|>⟦{content}</s>⟧"
        text += f"<|{'user' if message['role'] == 'user' else 'model'}|>{content}"
    return text + "</s>"


def mistral_v7(messages: list[Message], tools: Tools) -> str:
    name = "axolotl/mistral_v7_tekken"
    default = f"{literal(name, 'You are Mistral Small 3')}{TODAY}{literal(name, '.' + chr(10) * 2 + 'When')}"
    text = "<s>" if messages[0]["role"] == "system" else f"<s>[SYSTEM_PROMPT]{default}[/SYSTEM_PROMPT]"
    turns = {"system": "[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]", "user": "[INST]{}[/INST]", "assistant": "⟦{}</s>⟧"}
    return text + "".join(turns[message["role"]].replace("{}", message["content"]) for message in messages)


def falcon_instruct(messages: list[Message], tools: Tools) -> str:
    """Empty lines are rewritten; nothing ends an answer."""
    rules, rest = _rules(messages)
    turns = ((message["role"].capitalize(), message["content"].replace("\n\n", "\n").strip()) for message in rest)
    return (rules or "").strip() + "".join(f"\n\n{role}: {content}" for role, content in turns)


IM = (
    "<|im_start|>user\n{}<|im_end|>\n",
    "<|im_start|>assistant\n⟦{}<|im_end|>⟧\n",
    "<|im_start|>system\n{}<|im_end|>\n",
)
COHERE = frames(
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦{}<|END_OF_TURN_TOKEN|>⟧",
    "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
    start="<s>",
    strip="ua",
)
GEMMA = ("<start_of_turn>user\n{}<end_of_turn>\n", "<start_of_turn>model\n⟦{}<end_of_turn>⟧\n", "{}\n\n")
LLAMA3 = frames(
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦{}<|eot_id|>⟧",
    "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
    start="<s>",
    strip="sua",
)
PHI = ("<|user|>\n{}<|end|>\n", "<|assistant|>\n⟦{}<|end|>⟧\n", "<|system|>\n{}<|end|>\n")

ANNOTATED: dict[str, Annotated] = {
    "axolotl/alpaca": Annotated(alpaca),
    "axolotl/aya": COHERE,
    "axolotl/chatml": frames(*IM),
    "axolotl/cohere": COHERE,
    "axolotl/command_a": command_a("axolotl/command_a"),
    "axolotl/command_a_rag": command_a("axolotl/command_a_rag"),
    "axolotl/command_a_tool_use": command_a("axolotl/command_a_tool_use"),
    "axolotl/deepseek_v2": frames("<｜User｜>{}", "<｜Assistant｜>⟦{}<｜end▁of▁sentence｜>⟧", "{}\n\n", start="<s>"),
    "axolotl/deepseek_v3": Annotated(deepseek_v3),
    "axolotl/exaone": frames(
        "[|user|]{}\n",
        "[|assistant|]⟦{}[|endofturn|]⟧\n",
        "[|system|]{}[|endofturn|]\n",
        default="[|system|][|endofturn|]\n",
    ),
    "axolotl/exaone4": Annotated(exaone4),
    "axolotl/falcon_h1": Annotated(falcon_h1),
    "axolotl/gemma": merged(*GEMMA, start="<s>", strip="ua"),
    "axolotl/gemma3": merged(*GEMMA, start="<s>", strip="ua"),
    "axolotl/gemma3n": merged(*GEMMA, start="<s>", strip="ua"),
    "axolotl/gemma4": Annotated(gemma4),
    "axolotl/gemma4_unified": Annotated(gemma4),
    "axolotl/jamba": Annotated(jamba),
    "axolotl/llama3": LLAMA3,
    "axolotl/llama3_2_vision": Annotated(llama3_2),
    "axolotl/llama4": Annotated(llama4),
    "axolotl/llava": frames("USER: {} ", "ASSISTANT: {} ", "{} "),
    "axolotl/metharme": Annotated(metharme, per_turn=True),
    "axolotl/mistral_v1": merged(" [INST] {} [/INST]", "⟦ {}</s>⟧", "{}\n\n", start="<s>"),
    "axolotl/mistral_v2v3": mistral_tools(" ", " ", trim=True),
    "axolotl/mistral_v3_tekken": mistral_tools("", "", trim=False),
    "axolotl/mistral_v7_tekken": Annotated(mistral_v7),
    "axolotl/nemotron_h": frames(*IM),
    "axolotl/phi_3": frames(
        "<|user|>\n{}<|end|>\n<|assistant|>\n", "⟦{}<|end|>⟧\n", "<|system|>\n{}<|end|>\n", start="<s>"
    ),
    "axolotl/phi_35": frames(*PHI),
    "axolotl/phi_4": frames(
        "<|im_start|>user<|im_sep|>{}<|im_end|>",
        "<|im_start|>assistant<|im_sep|>⟦{}<|im_end|>⟧",
        "<|im_start|>system<|im_sep|>{}<|im_end|>",
        default="You are Phi, a language model",
        name="axolotl/phi_4",
    ),
    "axolotl/pixtral": frames("[INST]{}[/INST]", "⟦{}</s>⟧", start="<s>"),
    "axolotl/qwen2_vl": frames(*IM, default="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"),
    "axolotl/qwen3": qwen_3("axolotl/qwen3"),
    "axolotl/qwen3_5": qwen_3("axolotl/qwen3_5"),
    "axolotl/qwen_25": qwen_25("axolotl/qwen_25"),
    "chujiezheng/alpaca": frames(
        "### Instruction:\n{}\n\n", "### Response:\n⟦{}</s>⟧\n\n", "{}\n\n", start="<s>", strip="sua"
    ),
    "chujiezheng/amberchat": frames("###Human: {}\n", "###Assistant: {}\n", "{}\n", start="<s>", strip="sua"),
    "chujiezheng/chatml": frames(*IM, start="<s>", strip="sua"),
    "chujiezheng/chatqa": frames("\n\nUser: {}", "\n\nAssistant: {}", "System: {}", start="<s>", strip="sua"),
    "chujiezheng/falcon-instruct": Annotated(falcon_instruct),
    "chujiezheng/gemma-it": merged(*GEMMA, strip="s", jointly=True),
    "chujiezheng/granite-3.0-instruct": Annotated(granite),
    "chujiezheng/llama-2-chat": merged(
        "<s>[INST] {} [/INST]", "⟦ {} </s>⟧", "<<SYS>>\n{}\n<</SYS>>\n\n", strip="s", jointly=True
    ),
    "chujiezheng/llama-3-instruct": LLAMA3,
    "chujiezheng/mistral-instruct": frames("[INST] {} [/INST]", "⟦ {}</s>⟧", "{}\n\n", start="<s>", strip="sua"),
    "chujiezheng/openchat-3.5": frames(
        "GPT4 Correct User: {}<|end_of_turn|>",
        "GPT4 Correct Assistant:⟦ {}<|end_of_turn|>⟧",
        "{}<|end_of_turn|>",
        start="<s>",
        strip="s",
    ),
    "chujiezheng/phi-3-small": frames(*PHI, start="<s>", strip="sua"),
    "chujiezheng/phi-3": frames(*PHI, strip="sua"),
    "chujiezheng/qwen2.5-instruct": qwen_25("chujiezheng/qwen2.5-instruct"),
    "chujiezheng/saiga": frames("<s>user\n{}</s>", "<s>bot\n⟦{}</s>⟧", "<s>system\n{}</s>", strip="sua"),
    "chujiezheng/solar-instruct": frames(
        "### User:\n{}\n\n", "### Assistant:\n{}\n\n", "### System:\n{}\n\n", start="<s>", strip="sua"
    ),
    "chujiezheng/vicuna": frames("USER: {}\n", "ASSISTANT:⟦ {}</s>⟧\n", "{}\n\n", start="<s>", strip="sua"),
    "chujiezheng/zephyr": frames(
        "<|user|>\n{}</s>\n", "<|assistant|>\n⟦{}</s>⟧\n", "<|system|>\n{}</s>\n", strip="sua"
    ),
}
