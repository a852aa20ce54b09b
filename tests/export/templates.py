"""Chat templates of the usual shapes, short, and chats that render them."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

from qlora_cli.data.chat import Chat, ChatSettings, chat_settings, make_chat
from qlora_cli.recipe.schema import Data
from tests.tiny import TEMPLATE, tiny_tokenizer

LOOP = "{% for m in messages %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"

SHAPES = {
    "chatml": TEMPLATE,
    "a system text by default": "{% if messages[0].role != 'system' %}"
    "<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
    + LOOP
    + TURN
    + "{% endfor %}"
    + PROMPT,
    "the system text in the user's turn": "<s>{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}" + LOOP + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}[INST] "
    "{% if loop.first and s is defined %}<<SYS>>\n{{ s }}\n<</SYS>>\n\n{% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
    "no system text": LOOP + "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    "signs of Go and of Modelfiles": LOOP + '{{ \'{{"""\' + m.role + \'"""}}\' }}\u00a0{{ m.content }}"\n{% endfor %}'
    '{{ "{" }}',
    "another prompt than history": LOOP + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
}  # fmt: skip
"""Templates that two neighbouring roles decide."""

NUMBERED = LOOP + "{{ loop.index }}. {{ m.role }}: {{ m.content }}\n{% endfor %}"
LAST_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
    + LOOP
    + "{% if m.role == 'user' %}[INST] {% if loop.last and s is defined %}{{ s }}\n\n{% endif %}{{ m.content }} [/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
TRIMMED = (
    LOOP + "{{ m.role }}: {{ m.content | trim }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def settings_of(template: str | None) -> ChatSettings:
    """The settings of a tiny tokenizer with a template."""
    tokenizer = tiny_tokenizer()
    settings = chat_settings(Data(train=[{"path": "x"}]), tokenizer, frozenset(), date(2026, 1, 1))
    return replace(settings, template=template, special={**settings.special, "bos_token": "<s>"})


def chat_of(template: str) -> Chat:
    return make_chat(settings_of(template))
