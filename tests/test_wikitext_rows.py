"""The rows of WikiText-2: nothing is lost, no piece is too long, no word is cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import REPOSITORY
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def script() -> Any:
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "scripts"))
        import wikitext_rows  # type: ignore[import-not-found]

        return wikitext_rows


WORDS = st.lists(st.sampled_from(["a", "word", "und", "Ätna", "@-@", "\n", "=", "supercalifragilistic"]), max_size=60)


@given(WORDS, st.integers(1, 12), st.integers(1, 4))
def test_pieces_add_up_to_the_text_and_none_has_too_many_tokens(script, words, most, width):
    text = " ".join(words)
    begins = [at for at in range(len(text)) if at % width == 0 or text[at - 1] == " "]  # some tokenizer's
    found = [*script.pieces(text, begins, most)]
    assert "".join(found) == text
    at = 0
    for piece in found:
        assert piece
        assert sum(at <= begin < at + len(piece) for begin in begins) <= most
        at += len(piece)


def test_pieces_are_cut_behind_white_space_and_nearly_full(script):
    tokenizer = tiny_tokenizer()
    text = " ".join(f"word{number}" for number in range(500)) + " \n"
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    found = [*script.pieces(text, [begin for begin, _ in offsets], 100)]
    lengths = [len(tokenizer(piece, add_special_tokens=False).input_ids) for piece in found]
    assert all(piece[-1] in " \n" for piece in found)
    assert max(lengths) <= 100
    assert min(lengths[:-1]) > 85


def test_a_word_longer_than_a_piece_is_cut(script):
    assert [*script.pieces("x" * 10, range(10), 4)] == ["xxxx", "xxxx", "xx"]
