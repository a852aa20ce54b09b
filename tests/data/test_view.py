"""Rows as pieces of text: whole characters, visible special tokens, and what is trained as the labels say."""

from __future__ import annotations

import pytest
from tiny_tokenizer import tiny_tokenizer

from qlora_cli.data.encode import IGNORE_INDEX, Example
from qlora_cli.data.examples import Examples, SourceCount
from qlora_cli.data.view import (
    Piece,
    bar,
    end_of,
    figure,
    marked,
    pieces,
    row_of,
    shortened,
    shown,
    special_ids,
    visible,
)

TEXT = "<|im_start|>user\nsay 😀<|im_end|>\n<|im_start|>assistant\nπ 👩‍👩‍👧 über<|im_end|>"
MARKS = ("⟦", "⟧", "‹", "›")


def example(tokenizer, text: str, trained_from: str) -> Example:
    """The text with everything trained from the last place where `trained_from` begins."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    begin = len(tokenizer(text[: text.rindex(trained_from)], add_special_tokens=False)["input_ids"])
    return Example(ids, [IGNORE_INDEX] * begin + ids[begin:], "rows.jsonl:1")


def cut(tokenizer, example: Example) -> list[Piece]:
    return pieces(example, tokenizer, special_ids(tokenizer, frozenset()))


@pytest.mark.parametrize("kind", ["bytes", "trimmed", "pieces"])
def test_pieces_are_the_decoded_row_with_whole_characters(kind: str):
    tokenizer = tiny_tokenizer(kind)
    row = example(tokenizer, TEXT, "π")
    found = cut(tokenizer, row)
    assert "".join(piece.text for piece in found) == tokenizer.decode(row.input_ids)
    assert not any("\ufffd" in piece.text for piece in found)
    assert [token for piece in found for token in piece.ids] == row.input_ids
    assert sum(len(piece.ids) for piece in found if piece.trained) == row.num_trained
    assert any("👩‍👩‍👧 über" in piece.text for piece in found if piece.trained)


def test_special_tokens_stand_alone_and_text_that_looks_like_one_is_text():
    tokenizer = tiny_tokenizer()
    found = cut(tokenizer, example(tokenizer, TEXT, "π"))
    assert marked(found, MARKS) == (
        "‹<|im_start|>›user\nsay 😀‹<|im_end|>›\n‹<|im_start|>›assistant\n⟦π 👩‍👩‍👧 über‹<|im_end|>›⟧"
    )
    letters = tokenizer(["<", "|im_end|>"], add_special_tokens=False)["input_ids"]
    ids = letters[0] + letters[1]
    looks = cut(tokenizer, Example(ids, [IGNORE_INDEX] * len(ids), "rows.jsonl:1"))
    assert [(piece.text, piece.special) for piece in looks] == [("<|im_end|>", False)]


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_half_a_character_is_spelled_in_bytes(kind: str):
    tokenizer = tiny_tokenizer(kind)
    ids = tokenizer("say 😀", add_special_tokens=False)["input_ids"][:-2]
    (piece,) = cut(tokenizer, Example(ids, [IGNORE_INDEX] * len(ids), "rows.jsonl:1"))
    assert piece.text.strip() == r"say \xf0\x9f"
    whole = tokenizer("say 😀", add_special_tokens=False)["input_ids"]
    split = cut(tokenizer, Example(whole, [IGNORE_INDEX] * len(ids) + whole[-2:], "rows.jsonl:1"))
    assert [piece.text.strip() for piece in split] == [r"say \xf0\x9f", r"\x98\x80"]


def test_a_replacement_character_of_the_data_stays():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("so \ufffd", add_special_tokens=False)["input_ids"]
    assert [piece.text for piece in cut(tokenizer, Example(ids, ids, "x:1"))][-1].endswith("\ufffd")


def test_the_first_token_is_never_shown_as_trained():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("abc", add_special_tokens=False)["input_ids"]
    found = cut(tokenizer, Example(ids, ids, "x:1"))
    assert [piece.trained for piece in found] == [False, True]


def test_stop_tokens_are_special_though_the_tokenizer_says_nothing_of_them():
    tokenizer = tiny_tokenizer()
    index = tokenizer.convert_tokens_to_ids("a")
    assert index not in special_ids(tokenizer, frozenset())
    assert index in special_ids(tokenizer, frozenset({index}))


def test_a_row_is_plain_values_with_its_number_and_place():
    tokenizer = tiny_tokenizer()
    row = example(tokenizer, TEXT, "π")
    told = row_of(Examples((row,)), 0, tokenizer, frozenset())
    assert (told["number"], told["where"]) == (1, "rows.jsonl:1")
    assert (told["num_tokens"], told["num_trained"]) == (row.num_tokens, row.num_trained)
    assert [token for piece in told["pieces"] for token in piece["ids"]] == row.input_ids


def source(number: int) -> SourceCount:
    return SourceCount("x", "text", False, 1.0, 0, number, 0, number, 0, 0)


@pytest.mark.parametrize(
    ("sizes", "number", "expected"),
    [
        ([9], 3, [0, 1, 2]),
        ([2], 3, [0, 1]),
        ([9, 9], 2, [0, 9]),
        ([1, 9, 9], 5, [0, 1, 2, 10, 11]),
        ([0, 4], 2, [0, 1]),
        ([9, 9], 0, []),
        ([9, 9, 9], 2, [0, 9]),
    ],
)
def test_examples_are_shown_from_every_source_in_turn(sizes: list[int], number: int, expected: list[int]):
    assert shown(Examples(sources=tuple(map(source, sizes))), number) == expected


def test_long_texts_lose_their_middle_and_say_how_much():
    text = " ".join(f"word{at}" for at in range(200))
    short = Piece("short", False, False, (1,))
    parts = shortened([short, Piece(text, False, False, (1, 2)), Piece(text[:1000], True, False, (3,))])
    assert [parts[0].text, parts[-1].text] == ["short", text[:1000]]
    head, gap, tail = parts[1:4]
    assert text.startswith(head.text)
    assert text.endswith(tail.text)
    assert len(head.text) + gap.num_cut + len(tail.text) == len(text)
    assert f"[... {gap.num_cut:,} characters ...]" in marked(parts, MARKS)
    many = shortened([short, Piece("b", True, False, (2,))] * 40)
    assert len(many) == 25
    assert many[12].num_cut == 28 * len("short") + 28 * len("b")


def test_what_would_move_the_terminals_cursor_is_spelled():
    assert visible("a\x1b[31m\r\x00\u202eb\tc\nd é 👩‍👩‍👧") == "a\\x1b[31m\\r\\x00\\u202eb\tc\nd é 👩‍👩‍👧"


def test_small_forms_of_numbers_paths_and_bars():
    assert [figure(number) for number in (0, 9_999_999, 12_345_678, 3_210_000_000)] == [
        "0", "9,999,999", "12.3M", "3.21B"]  # fmt: skip
    assert end_of("/a/b/rows.jsonl", 15) == "/a/b/rows.jsonl"
    assert end_of("/long/folder/rows.jsonl", 16) == ".../rows.jsonl"
    assert end_of("a-name-without-folders.jsonl", 10) == "...s.jsonl"
    assert [bar(length, True) for length in (0, 0.01, 1, 2.5)] == ["", "▏", "█", "██▌"]
    assert [bar(length, False) for length in (0, 0.01, 2.4)] == ["", "#", "##"]
