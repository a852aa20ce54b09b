"""Every text of a row, a tool call's and a tool's too, is found in the rendering, or is missed there."""

from __future__ import annotations

from typing import Any

import pytest
from rendering import CALLING, calling, refusal, rows_of, spans_of
from tiny_tokenizer import CHATML

from qlora_cli.data.conversations import Conversation, assistant, user
from qlora_cli.data.marks import MARKS, Leaf, Marker, spellings, variants

TURNS = [user("first"), assistant("one"), user("second"), assistant("two")]
TOOLS = [
    {"type": "function", "function": {"name": "find", "description": "Finds it", "parameters": {"type": "object"}}}
]


def test_marks_stand_inside_the_outer_white_space_and_come_off_again() -> None:
    marker = Marker("data.jsonl:7")
    marked = marker.message({**assistant(" one\n"), "reasoning_content": "why"}, 1)
    assert marked["content"].strip() != marked["content"]
    assert marked["content"].strip()[1:-1] == "one"
    assert MARKS.sub("", marked["content"]) == " one\n"
    assert marker.leaves == [Leaf(1, "the reasoning", "why"), Leaf(1, "the text", "one")]


def test_an_empty_text_is_not_marked() -> None:
    marker = Marker("")
    assert marker.message(user(" \n"), 0)["content"] == " \n"
    assert marker.leaves == []


def test_only_a_calls_text_may_be_spelled_as_json() -> None:
    assert spellings(Leaf(1, "the text", 'a"é')) == {'a"é'}
    assert spellings(Leaf(1, "a tool call's argument", 'a"')) == {'a"', 'a\\"', 'a\\\\\\"'}
    assert spellings(Leaf(-1, "the name of a tool", "é")) == {"é"}


def test_marks_in_the_text_are_refused() -> None:
    assert "a text of message 2 holds private-use characters above U+F0000" in refusal(
        CHATML, [user("a"), assistant("\U000f0001")]
    )


def test_a_tool_call_is_trained_like_an_answer() -> None:
    call = calling({"city": 'Zürich "x"\n', "days": 3, "all": [True, None]})
    turns = [user("a"), call, {"role": "tool", "content": "sunny"}, assistant("b")]
    arguments = r'{"city": "Zürich \"x\"\n", "days": 3, "all": [true, null]}'
    assert spans_of(CALLING, turns) == [f"[find {arguments}]<|im_end|>", "b<|im_end|>"]
    assert spans_of(CALLING, [user("a"), calling({})]) == ["[find {}]<|im_end|>"]


def test_texts_may_be_written_as_json_in_json() -> None:
    nested = CALLING.replace("c.function.arguments | tojson", "(c.function.arguments | tojson) | tojson")
    assert spans_of(nested, [user("a"), calling({"x": 'é"'})]) == [r'[find "{\"x\": \"é\\\"\"}"]<|im_end|>']
    ascii_only = CALLING.replace("arguments | tojson", "arguments | tojson(ensure_ascii=true)")
    assert "rewrites the texts of the row" in refusal(ascii_only, [user("a"), calling({"x": "é"})])  # the marks too


def test_a_dropped_part_of_a_call_is_noticed() -> None:
    call = [user("a"), calling({"city": "Bern", "days": 3})]
    number = [user("a"), calling({"days": 3})]
    nameless = CALLING.replace("c.function.name", "''")
    silent = CALLING.replace("c.function.arguments | tojson", "''")
    texts_alone = CALLING.replace("c.function.arguments | tojson", "c.function.arguments.city")
    assert "drops a tool call's name of message 2 (assistant)" in refusal(nameless, call)
    assert "drops a tool call's argument of message 2 (assistant)" in refusal(silent, call)
    assert "drops a tool call's arguments of message 2 (assistant)" in refusal(silent, number)
    assert "drops a tool call's arguments of message 2 (assistant)" in refusal(texts_alone, call)
    assert "drops a tool call's name of message 2 (assistant)" in refusal(CHATML, call)
    assert spans_of(silent, [user("a"), calling({})]) == ["[find ]<|im_end|>"]


def test_the_second_of_two_calls_is_noticed_too() -> None:
    two = calling({"n": 1})
    two["tool_calls"] = [*two["tool_calls"], *calling({"n": 2}, name="get")["tool_calls"]]
    assert spans_of(CALLING, [user("a"), two]) == ['[find {"n": 1}][get {"n": 2}]<|im_end|>']
    first_alone = CALLING.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    assert "drops a tool call's name" in refusal(first_alone, [user("a"), two])


def test_the_text_beside_a_call_is_noticed() -> None:
    template = CALLING.replace("{{ m.content }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}")
    assert "drops the text of message 2" in refusal(template, [user("a"), calling({"n": 1}, "I look it up")])
    assert spans_of(CALLING, [user("a"), calling({}, "I look")]) == ["I look[find {}]<|im_end|>"]


def test_a_calls_name_may_be_written_again_with_its_result() -> None:
    name = "{% if m.role == 'tool' %}{{ messages[1].tool_calls[0].function.name }}: {% endif %}"
    again = CALLING.replace("{{ m.content }}", name + "{{ m.content }}")
    turns = [user("a"), calling({"n": 1}), {"role": "tool", "content": "sunny"}, assistant("b")]
    assert rows_of(again, turns)[0].text.count("find") == 2
    assert spans_of(again, turns) == ['[find {"n": 1}]<|im_end|>', "b<|im_end|>"]


def test_tools_that_the_template_does_not_write_are_noticed() -> None:
    listing = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}\n" + CHATML
    content = Conversation(TURNS, tools=TOOLS)
    assert spans_of(listing, content) == ["one<|im_end|>", "two<|im_end|>"]
    assert "drops the name of a tool ('find')" in refusal(CHATML, content)
    names = listing.replace("t | tojson", "t.function.name")
    assert "drops the description of a tool ('Finds it')" in refusal(names, content)
    twice = listing.replace("{{ t | tojson }}", "{{ t | tojson }}{{ t.function.name }}")
    assert len(spans_of(twice, content)) == 2


def test_parameters_of_a_tool_that_the_template_drops_are_noticed() -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string", "description": "Where"}}}
    tools = [{"type": "function", "function": {"name": "find", "description": "Finds it", "parameters": parameters}}]
    content = Conversation(TURNS, tools=tools)
    listing = "{% for t in tools or [] %}{{ t.function.name }}: {{ t.function.description }}{% endfor %}\n" + CHATML
    assert "drops the parameters of a tool ('find')" in refusal(listing, content)
    needing = listing.replace("{% endfor %}\n", " {{ t.function.parameters.properties.city.type }}{% endfor %}\n", 1)
    assert len(spans_of(needing, content)) == 2


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ("c.function.arguments.a.c", {"a": {"b": 1, "c": "t"}}),
        ("c.function.arguments.values() | list | tojson", {"a": "x", "b": "y"}),
        ("c.function.arguments.a | map(attribute='k') | list | tojson", {"a": [{"k": "x", "n": 1}]}),
        ("c.function.arguments.a[:1] | tojson", {"a": ["x", 2]}),
    ],
)
def test_a_key_or_a_number_within_a_calls_arguments_that_is_dropped_is_noticed(
    written: str, arguments: dict[str, Any]
) -> None:
    template = CALLING.replace("c.function.arguments | tojson", written)
    turns = [user("a"), calling(arguments)]
    assert "drops a tool call's arguments of message 2 (assistant)" in refusal(template, turns)
    assert len(spans_of(CALLING, turns)) == 1


def test_variants_rename_each_key_and_leave_out_each_value_without_a_text() -> None:
    found = list(variants({"a": {"b": 1, "c": "t"}, "d": [True, "u"]}))
    assert {"a": {"c": "t"}, "d": [True, "u"]} in found
    assert {"a": {"b": 1, "c": "t"}, "d": ["u"]} in found
    assert {"a\U000f0000": {"b": 1, "c": "t"}, "d": [True, "u"]} in found
    assert len(found) == 6
    assert list(variants("t")) == list(variants(7)) == []
