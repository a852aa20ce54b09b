"""Lengths: what is cut, what is left out, and what is counted of it."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.data.encode import IGNORE_INDEX, Example
from qlora_cli.data.limits import LONG_ROWS, Limits, fitted, length_in_words, num_stops
from qlora_cli.errors import UserError
from qlora_cli.recipe.schema import Data

STOP = 99


def example_of(prompt: int, answer: int, stop: bool = False) -> Example:
    ids = [*range(prompt + answer), *([STOP] if stop else [])]
    return Example(ids, [IGNORE_INDEX] * prompt + ids[prompt:], "a:1")


def data_of(**limits: object) -> Data:
    return Data.model_validate({"train": [{"path": "x"}], **limits})


def test_every_policy_of_the_recipe_is_in_the_table() -> None:
    assert set(LONG_ROWS) == set(Data.model_fields["on_long_row"].annotation.__args__)


def test_the_recipes_limits_are_one_or_two() -> None:
    assert Limits.of(data_of(max_length=7)) == Limits(7, None, None, "error")
    both = Limits.of(data_of(source_max_length=5, target_max_length=3, on_long_row="skip"))
    assert both == Limits(None, 5, 3, "skip")
    assert (Limits(7).longest, both.longest) == (7, 8)
    assert str(Limits(2048)) == "data.max_length is 2,048"
    assert str(both) == "data.source_max_length is 5 and target_max_length 3"


@pytest.mark.parametrize(("one", "other"), [("source", "target"), ("target", "source")])
def test_one_limit_of_prompt_and_answer_needs_the_other(one: str, other: str) -> None:
    with pytest.raises(UserError) as caught:
        Limits.of(data_of(**{f"{one}_max_length": 5}))
    assert str(caught.value) == (
        f"data.{other}_max_length: is not set, but {one}_max_length is. Set both, or neither and max_length."
    )


@given(st.integers(0, 12), st.integers(1, 12), st.booleans(), st.integers(1, 15), st.integers(1, 15))
def test_limits_hold_and_cut_only_what_is_too_long(
    prompt: int, answer: int, apart: bool, first: int, second: int
) -> None:
    example = example_of(prompt, answer)
    ids = example.input_ids
    limits = Limits(None, first, second) if apart else Limits(first)
    cut = limits.cut(example)
    assert len(cut.input_ids) == len(cut.labels) <= limits.longest
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(cut.input_ids, cut.labels, strict=True))
    assert cut.input_ids == (ids[: min(prompt, first)] + ids[prompt : prompt + second] if apart else ids[:first])
    assert (cut is example) == (cut.input_ids == ids)


def within(example: Example, limits: Limits, stops: frozenset[int], tally: Counter[str]) -> Example | None:
    """The example within the limits, as causal_lm cuts it."""
    return fitted(example, limits.cut(example), limits, stops, tally)


@pytest.mark.parametrize("policy", LONG_ROWS)
def test_what_fits_is_itself_under_every_policy(policy: str) -> None:
    tally: Counter[str] = Counter()
    example = example_of(3, 2)
    assert within(example, Limits(5, on_long_row=policy), frozenset(), tally) is example
    assert not +tally


def test_rows_that_do_not_fit_are_left_out_cut_or_emptied_and_counted() -> None:
    stops = frozenset({STOP})
    tally: Counter[str] = Counter()
    example = example_of(3, 4, stop=True)
    assert within(example, Limits(5, on_long_row="error"), stops, tally) is None
    assert within(example, Limits(5, on_long_row="skip"), stops, tally) is None
    cut = within(example, Limits(5, on_long_row="truncate"), stops, tally)
    assert cut is not None
    assert (cut.input_ids, cut.num_trained, cut.where) == ([0, 1, 2, 3, 4], 2, "a:1")
    assert within(example, Limits(3, on_long_row="truncate"), stops, tally) is None
    assert dict(+tally) == {
        "num_skipped": 1,
        "num_truncated": 1,
        "num_emptied": 1,
        "num_cut_tokens": 3,
        "num_cut_trained": 3,
        "num_lost_stops": 1,
    }


def test_stops_count_where_they_are_trained() -> None:
    assert num_stops(Example([STOP, 1, STOP, STOP], [STOP, 1, IGNORE_INDEX, STOP], ""), frozenset({STOP})) == 1


def test_lengths_in_words() -> None:
    assert length_in_words(1201, 1200, "causal_lm") == "1,201 tokens (1,200 before the answer)"
    assert length_in_words(12, 1, "seq2seq_lm") == "12 tokens (1 of the source)"
    assert length_in_words(1, 1, "sequence_classification") == "1 token"


def test_the_limits_of_a_source_and_a_target_are_told_by_the_keys_that_were_set() -> None:
    rows = [{"path": "x"}]
    both = Limits.of(Data(train=rows, max_length=40), "seq2seq_lm")
    assert (both.source_max_length, both.target_max_length, both.longest, both.most_positions) == (40, 40, 80, 40)
    assert str(both) == "data.max_length is 40, for the source and for the target"
    apart = Limits.of(Data(train=rows, source_max_length=9, target_max_length=5), "seq2seq_lm")
    assert (apart.max_length, apart.longest, apart.most_positions) == (None, 14, 9)
    assert str(apart) == "data.source_max_length is 9 and target_max_length 5"
    assert Limits.of(Data(train=rows, source_max_length=9, target_max_length=5)).most_positions == 14
