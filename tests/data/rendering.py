"""Conversations under small templates, for the tests of spans and marks."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_tokenizer import tiny_chat

from qlora_cli.data.conversations import Conversation, Message, Plain, assistant
from qlora_cli.data.spans import Rendered, render_row
from qlora_cli.errors import UserError

CALLING = (  # ChatML with calls, as JSON
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}[{{ "
    "c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def rows_of(template: str, messages: list[Message] | Conversation, **options: Any) -> list[Rendered]:
    content = messages if isinstance(messages, Conversation) else Conversation(messages)
    return render_row(content, tiny_chat(template, **options), "data.jsonl:7")


def spans_of(template: str, messages: list[Message] | Conversation, **options: Any) -> list[str]:
    """The trained texts of a row that stays one."""
    (row,) = rows_of(template, messages, **options)
    return [row.text[start:end] for start, end in row.spans]


def refusal(template: str | None, content: list[Message] | Conversation | Plain, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        render_row(
            Conversation(content) if isinstance(content, list) else content,
            tiny_chat(template, **options),
            "data.jsonl:7",
        )
    return str(caught.value)


def calling(arguments: dict[str, Any], content: str = "", name: str = "find") -> Message:
    return {
        **assistant(content),
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }
