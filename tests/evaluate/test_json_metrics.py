"""What is JSON by RFC 8259, and when two texts are the same value."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.errors import UserError
from qlora_cli.evaluate.metrics import METRICS

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3), max_leaves=8
)


def valid(text: str) -> bool:
    return bool(METRICS["json_valid"].rows([text], [[]])[0, 0])


def equal(text: str, answer: str) -> bool:
    return bool(METRICS["json_equal"].rows([text], [[answer]])[0, 0])


@settings(deadline=None)
@given(VALUES)
def test_what_is_written_as_json_is_valid_and_itself(value):
    text = json.dumps(value)
    assert valid(text)
    assert equal(text, json.dumps(value, indent=2, ensure_ascii=False))


@settings(deadline=None)
@given(st.dictionaries(st.text(), VALUES, min_size=2, max_size=4))
def test_the_order_of_keys_is_none(value):
    assert equal(json.dumps(value), json.dumps(dict(reversed(value.items()))))


@settings(deadline=None)
@given(VALUES)
def test_half_an_object_is_not_json(value):
    assert not valid(json.dumps({"key": value})[:-1])


@pytest.mark.parametrize(
    "text", ["", "NaN", "[Infinity]", "{'a': 1}", '{"a": 1,}', "01", "```json\n{}\n```", "{} {}", "[" * 10**5]
)
def test_what_python_or_a_model_writes_may_be_none(text):
    assert not valid(text)
    assert not equal(text, "{}")


@pytest.mark.parametrize("text", [" null\n", "9" * 5000, "1e400", "-0.0", '"\\ud800"', '{"a": 1, "a": 2}'])
def test_odd_json_is_json(text):
    assert valid(text)
    assert equal(text, text)


def test_a_number_is_its_value_and_nothing_else():
    assert equal("[1, 10e-1, 0]", "[1.0, 1, -0]")
    assert not equal("9007199254740993", "9007199254740992")
    assert not equal('{"a": true}', '{"a": 1}')
    assert not equal("0", "false")
    assert not equal("1", '"1"')
    assert not equal("1", '["number", 1]')


def test_an_answer_that_is_not_json_is_a_message():
    with pytest.raises(UserError, match=r"metric json_equal: the answer 'five' of row 1 is not JSON\. Mend the row"):
        METRICS["json_equal"].rows(["5", "5"], [["5"], ["5", "five"]])
