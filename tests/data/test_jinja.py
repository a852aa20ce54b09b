"""Our Jinja writes what transformers writes, with a fixed date, and keeps templates in the same sandbox."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, datetime
from typing import Any

import jinja2
import pytest
from annotated_templates import ANNOTATED, FOLDER, TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st
from template_verdicts import CALL, PLAIN, RESULT, TOOL, chat_of
from tiny_tokenizer import CHATML, chat_with, tiny_tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from qlora_cli.data.conversations import Message, assistant, system, user
from qlora_cli.data.jinja import TEMPLATE_ERRORS, compile_row_template, compile_template
from qlora_cli.errors import UserError

TODAY = date(2026, 1, 2)
MESSAGES: dict[str, list[Message]] = {
    **PLAIN,
    "reasoning": [user("Asks"), {**assistant("Says"), "reasoning_content": "Thinks"}, user("More"), assistant("Says")],
    "thought in the text": [
        user("Asks"),
        assistant("<think>\nThinks\n</think>\n\nSays"),
        user("More"),
        assistant("Yes"),
    ],
    "calls": [system("Rules"), user("Asks"), CALL, RESULT, assistant("Says")],
    "two results": [user("Asks"), {**CALL, "content": "So"}, RESULT, RESULT, assistant("Says"), user("More")],
    "answer first": [assistant("Says"), user("Asks")],
}


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[PreTrainedTokenizerFast]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", type("Fixed", (datetime,), {"now": lambda: TODAY}))
        yield tiny_tokenizer()


def theirs(tokenizer: PreTrainedTokenizerFast, messages: list[Message], **options: Any) -> str | None:
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return text
    except TEMPLATE_ERRORS:
        return None


@pytest.mark.skipif(not TEXTS, reason=f"no templates in {FOLDER}")
@pytest.mark.parametrize("name", ANNOTATED)
def test_the_published_templates_render_as_with_transformers(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    template, chat = TEXTS[name], chat_of(name, TEXTS[name], {})
    special = chat.settings.special
    rendered = 0
    for kind, messages in MESSAGES.items():
        for tools in (None, [TOOL]):
            for prompt in (False, True):
                options = {"tools": tools, "add_generation_prompt": prompt, "chat_template": template, **special}
                expected = theirs(tokenizer, messages, **options)
                try:
                    found: str | None = chat.render(messages, "", tools, prompt)
                except UserError:
                    found = None
                assert found == expected, kind
                rendered += found is not None
    assert rendered >= 20


@pytest.mark.skipif(not TEXTS, reason=f"no templates in {FOLDER}")
@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(ANNOTATED)),
    st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), st.text(max_size=8)), min_size=1),
)
def test_any_messages_render_as_with_transformers(
    tokenizer: PreTrainedTokenizerFast, name: str, turns: list[tuple[str, str]]
) -> None:
    messages = [{"role": role, "content": text} for role, text in turns]
    chat = chat_of(name, TEXTS[name], {})
    expected = theirs(tokenizer, messages, chat_template=TEXTS[name], **chat.settings.special)
    try:
        assert chat.render(messages, "") == expected
    except UserError:
        assert expected is None


SAME = {
    "trim_blocks": "  {% if true %}\n  a\n  {% endif %}\n b",
    "loop controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}a{% break %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}\n{% endgeneration %}{% endfor %}",
    "tojson": "{{ {'b': 'é<', 'a': [1, none]} | tojson }}{{ {'b': 1, 'a': 2} | tojson(indent=2, sort_keys=true) }}",
    "separators": "{{ {'b': 'é'} | tojson(ensure_ascii=true, separators=(',', ':')) }}",
    "dict": "{{ dict(a=1) }}{{ dict.fromkeys(['b'], 2) }}",
    "namespace": "{% set n = namespace(self=1, x=2) %}{% set n.x = 3 %}{{ n.x }}{{ n.self }}",
    "whole message": "{% for m in messages %}{{ m | tojson }}{% endfor %}",
    "undefined": "{{ nothing }}{{ messages[0].nothing }}{{ tools }}{{ documents }}",
    "date": "{{ strftime_now('%Y-%m-%d %H:%M') }}",
}


@pytest.mark.parametrize("case", SAME)
def test_what_a_template_may_use_works_as_with_transformers(case: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = SAME[case]
    messages = MESSAGES["reasoning"]
    assert chat_with(tokenizer).render(messages, "") == theirs(tokenizer, messages)


def test_the_date_is_the_given_one() -> None:
    template = compile_template("{{ strftime_now('%d %b %Y %H:%M') }}", date(2024, 2, 29))
    assert template.render() == "29 Feb 2024 00:00"


ESCAPES = {
    "a class": "{{ ''.__class__.__mro__ }}",
    "a function's globals": "{{ raise_exception.__globals__ }}",
    "the date's class": "{{ strftime_now.__self__.__class__ }}",
    "a changed list": "{{ messages.append(1) }}",
    "a private name": "{% set n = namespace(_x=1) %}",
    "a private name later": "{% set n = namespace() %}{% set n._x = 1 %}",
    "a long range": "{{ range(100001) | list }}",
    "a format": "{{ '{0.__class__}'.format(1) }}",
}


@pytest.mark.parametrize("case", ESCAPES)
def test_the_sandbox_gives_an_error_or_nothing(case: str) -> None:
    try:
        assert compile_template(ESCAPES[case], TODAY).render(messages=[]) == ""
    except (jinja2.exceptions.SecurityError, OverflowError):
        return


def test_a_templates_own_error_and_syntax_error_are_jinjas() -> None:
    with pytest.raises(jinja2.TemplateError, match="not this way"):
        compile_template("{{ raise_exception('not this way') }}", TODAY).render()
    with pytest.raises(jinja2.TemplateSyntaxError):
        compile_template("{% generation %}", TODAY)


def test_a_rows_template_knows_its_columns_alone() -> None:
    render = compile_row_template("{{ a }}: {{ b | tojson }}\n")
    assert render(a="x", b=["é"]) == 'x: ["é"]\n'
    with pytest.raises(jinja2.UndefinedError, match="'b' is undefined"):
        render(a="x")
    with pytest.raises(jinja2.exceptions.SecurityError):
        compile_row_template("{{ a.__class__.__mro__ }}")(a="x")


def test_chatml_needs_nothing_of_transformers() -> None:
    text = compile_template(CHATML, TODAY).render(messages=[user("a")], add_generation_prompt=True)
    assert text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_a_null_column_is_no_text_in_a_row_template():
    with pytest.raises(jinja2.TemplateError, match="a value is null"):
        compile_row_template("{{ title }}: {{ body }}")({"title": "a", "body": None})
    assert compile_row_template("{{ title }}: {{ body or '' }}")({"title": "a", "body": None}) == "a: "
