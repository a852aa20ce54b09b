"""Windows over texts predict each token once, as lm-evaluation-harness's own rolling windows."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.errors import UserError
from qlora_cli.evaluate.text_windows import TextWindow, text_windows, windows_of
from qlora_cli.recipe.schema import Source
from tests.evaluate.opening import write
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), st.integers(1, 40))
def test_the_windows_are_the_harness_s(text: str, length: int) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    rolled = utils.get_rolling_token_windows(ids, TOKENIZER.eos_token_id, max_seq_len=length, context_len=1)
    wanted = [utils.make_disjoint_window(window) for window in rolled]
    found = windows_of("here", text, TOKENIZER, length)
    assert [(one.ids[: one.num_context], one.ids[one.num_context :]) for one in found] == wanted
    assert sum(window.num_bytes for window in found) == len(text.encode())
    assert all(len(window.ids) <= length + 1 for window in found)


def test_a_character_of_several_tokens_counts_where_it_ends_or_begins_once() -> None:
    found = windows_of("here", "aŁb", TOKENIZER, 2)
    assert [len(window.ids) - window.num_context for window in found] == [2, 2]
    assert sum(window.num_bytes for window in found) == 4


def test_a_limit_counts_texts_and_empty_ones_have_no_window(tmp_path: Path) -> None:
    source = Source.model_validate(write(tmp_path / "rows.jsonl", [{"text": ""}, {"text": "abcde"}, {"text": "f"}]))
    found = list(text_windows([source], TOKENIZER, 3, 2))
    place = f"{source.path}:2"
    eos, *ids = [TOKENIZER.eos_token_id, *TOKENIZER("abcde")["input_ids"]]
    assert found == [TextWindow(place, [eos, *ids[:3]], 1, 3), TextWindow(place, ids[1:], 2, 2)]
    assert len(list(text_windows([source], TOKENIZER, 3, None))) == 3


def test_a_row_that_is_no_text_is_told_with_its_place(tmp_path: Path) -> None:
    source = Source.model_validate(write(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": 3}]))
    with pytest.raises(UserError, match=r"rows.jsonl:2: text is the number 3, not a text"):
        list(text_windows([source], TOKENIZER, 8, None))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(UserError, match=r"broken.jsonl:2"):
        list(text_windows([Source(path=str(tmp_path / "broken.jsonl"))], TOKENIZER, 8, None))
