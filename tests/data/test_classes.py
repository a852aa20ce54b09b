"""Texts and pairs with a class or a number: transformers' own ids, GLUE's files, and what is refused."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from task_rows_loading import load_task, refused_task
from task_tokenizers import TOKENIZERS, TYPES, bert, real_bert, roberta

from qlora_cli.data.encode import IGNORE_INDEX
from qlora_cli.data.examples import Examples
from qlora_cli.data.row_task import RowTask

NAMED = RowTask("sequence_classification", ("negative", "positive"), 2)
COUNTED = RowTask("sequence_classification", (), 3)
NUMERALS = RowTask("sequence_classification", ("1", "2", "3"), 3)
NUMBERS = RowTask("sequence_classification", (), 1)
TEXTS: list[tuple[str, ...]] = [
    ("A man is playing a large flute.",),
    ("the play about a prince " * 12,),
    ("A young child rides a horse.", "A man is playing."),
    ("the river Seine " * 12, "Paris"),
    ("Paris", "the river Seine " * 12),
    ("two million people " * 9, "the house near the river " * 8),
]


def rows_of(texts: list[tuple[str, ...]]) -> list[dict[str, Any]]:
    return [{**dict(zip(("text", "text_pair"), one, strict=False)), "label": at % 2} for at, one in enumerate(texts)]


def load(tmp_path: Path, rows: list[Any], task: RowTask = NAMED, **options: Any) -> Examples:
    options.setdefault("tokenizer", bert())
    return load_task(task, tmp_path, rows, **options)


def refused(tmp_path: Path, rows: list[Any], task: RowTask = NAMED, **options: Any) -> str:
    options.setdefault("tokenizer", bert())
    return refused_task(task, tmp_path, rows, **options)


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("longest", [6, 9, 25, 500])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_ids_are_those_of_transformers_whole_and_cut(name: str, longest: int, pair: bool, tmp_path: Path):
    tokenizer = TOKENIZERS[name]()
    texts = [one for one in TEXTS if len(one) == 1 + pair]
    examples = load(
        tmp_path, rows_of(texts), tokenizer=tokenizer, max_length=longest, on_long_row="truncate", source={}
    )
    for at, (example, one) in enumerate(zip(examples.rows, texts, strict=True)):
        wanted = tokenizer(*one, truncation=True, max_length=longest)
        assert example.input_ids == wanted["input_ids"]
        assert set(example.labels) == {IGNORE_INDEX}
        assert (example.targets, example.num_trained) == ((at % 2,), 1)
        if "token_type_ids" in tokenizer.model_input_names and "bert" in name:
            assert types_of(example.num_tokens, example.segment) == wanted["token_type_ids"]
    whole = [len(tokenizer(*one)["input_ids"]) for one in texts]
    assert examples.num_truncated == sum(length > longest for length in whole)
    assert examples.num_cut_tokens == sum(max(length - longest, 0) for length in whole)


def types_of(length: int, segment: int) -> list[int]:
    return [int(segment > 0 and at >= segment) for at in range(length)]


def test_long_texts_are_left_out_or_an_error(tmp_path: Path):
    rows = rows_of(TEXTS[:2])
    examples = load(tmp_path, rows, max_length=20, on_long_row="skip")
    assert (len(examples.rows), examples.num_skipped) == (1, 1)
    examples = load(tmp_path, rows, max_length=20, on_long_row="truncate")
    (line,) = examples.losses()
    assert line.startswith("1 row truncated: ")
    assert line.endswith(" tokens cut")
    message = refused(tmp_path, rows, max_length=20)
    assert "rows.jsonl:2: the row has " in message
    assert " tokens, but data.max_length is 20; in all 1 of 2 rows are too long" in message
    assert "before the answer" not in message


def test_the_summary_counts_labels(tmp_path: Path):
    assert load(tmp_path, rows_of(TEXTS[:2])).summary()[0].endswith(" tokens, 2 labels")


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"text": "c", "text_pair": None, "label": 1}, "text_pair"),
        ({"sentence": "c", "question": None, "label": 1}, "question"),
        ({"text": "c", "text_pair": None, "premise": None, "hypothesis": "d", "label": 1}, "text_pair"),
    ],
)
def test_a_second_text_that_is_null_is_refused_and_never_a_single_text(
    tmp_path: Path, row: dict[str, Any], column: str
):
    message = refused(tmp_path, [{**row, column: "b"}, row])
    assert f"rows.jsonl:2: {column} is null, and its column says that rows are pairs. Give all rows a second" in message
    assert ":1:" not in message


def test_columns_of_null_that_make_no_pair_of_the_texts_that_are_there_count_as_missing(tmp_path: Path):
    single = {"text": "a", "premise": None, "hypothesis": None, "label": 0}
    pair = {"premise": "a", "hypothesis": "b", "text": "c", "text_pair": None, "label": 0}
    first, second = load(tmp_path, [single, pair]).rows
    assert (first.segment, second.segment) == (0, 3)


def test_a_template_without_a_pair_reads_single_texts_beside_a_column_of_null(tmp_path: Path):
    template = {"prompt": "{{ text }}", "completion": "{{ label }}"}
    (example,) = load(tmp_path, [{"text": "c", "text_pair": None, "label": 1}], source={"template": template}).rows
    assert (example.segment, example.targets) == (0, (1,))


# ── labels ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("task", "label", "target"),
    [
        (NAMED, "positive", 1),
        (NAMED, 1, 1),
        (NAMED, "1", 1),
        (COUNTED, 2, 2),
        (COUNTED, "0", 0),
        (NUMBERS, "3.8", 3.8),
        (NUMBERS, 5, 5.0),
        (NUMBERS, -0.25, -0.25),
        (RowTask("sequence_classification", ("1", "2", "5"), 3), 2, 1),  # the class called 2, not the third
        (RowTask("sequence_classification", ("1", "2", "5"), 3), "5", 2),
        (RowTask("sequence_classification", ("0.5", "1.0"), 2), 1.0, 1),
        (RowTask("sequence_classification", ("nan", "inf"), 2), 1, 1),  # no number of a row is called so
        (RowTask("sequence_classification", ("False", "True"), 2), True, 1),
    ],
)
def test_a_label_is_a_name_an_id_or_a_number(tmp_path: Path, task: RowTask, label: Any, target: float):
    (example,) = load(tmp_path, [{"text": "a", "label": label}], task).rows
    assert example.targets == (target,)


@pytest.mark.parametrize(
    ("task", "label", "words"),
    [
        (NAMED, 2, "the label is the number 2, not one of negative, positive, or an id from 0 to 1. Mend the row, or"),
        (NAMED, "neutral", "the label is 'neutral', not one of negative, positive, or an id from 0 to 1. Mend the"),
        (NAMED, -1, "the label is the number -1, not one of negative, positive, or an id from 0 to 1. Name rows with"),
        (COUNTED, "3", "the label is '3', not an id from 0 to 2. Mend the row, or set model.labels to the names of"),
        (COUNTED, 1.5, "the label is the number 1.5, not an id from 0 to 2"),
        (COUNTED, True, "the label is true, not an id from 0 to 2"),
        *(
            (
                NUMERALS,
                label,
                f"the label is {shown}, none of the names 1, 2, 3. Mend the row: rows hold names and no ids",
            )
            for label, shown in ((0, "the number 0"), ("0", "'0'"), (4, "the number 4"), (1.0, "the number 1.0"))
        ),
        (NUMERALS, -1, "the label is the number -1, none of the names 1, 2, 3. Name rows with labels"),
        (
            RowTask("sequence_classification", ("few", "10"), 2),
            1,
            "the label is the number 1, none of the names few, 10",
        ),
        (NUMBERS, "high", "the label is 'high', not a number, and model.num_labels is 1. Mend the row, or set model."),
        (NUMBERS, "nan", "the label is 'nan', not a number"),
        (NUMBERS, [1], "the label is a list, not a number"),
    ],
)
def test_a_label_that_is_none_is_refused(tmp_path: Path, task: RowTask, label: Any, words: str):
    assert f"rows.jsonl:1: {words}" in refused(tmp_path, [{"text": "a", "label": label}], task)


@pytest.mark.parametrize("rows", [range(3), range(1, 4)])
def test_numbers_as_names_never_put_two_labels_into_one_class(tmp_path: Path, rows: range):
    lines = [{"text": "a", "label": label} for label in rows]
    if 0 in rows:
        assert "rows hold names and no ids, because the name 1 is a number" in refused(tmp_path, lines, NUMERALS)
    else:
        assert [row.targets for row in load(tmp_path, lines, NUMERALS).rows] == [(0,), (1,), (2,)]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "", "label": 0}, "the text is empty. Give the row a text, or remove it."),
        ({"text": " ", "label": 0}, "the text is empty"),
        ({"text": "a", "text_pair": "", "label": 0}, "a text of the pair is empty"),
        ({"text": 3, "label": 0}, "text is the number 3, not a text"),
        ({"text": "a [SEP] b", "label": 0}, "the text spells the special token '[SEP]'. Mend or remove the row."),
        ({"text": "a", "text_pair": "[PAD]", "label": 0}, "the text spells the special token '[PAD]'"),
        ({"text": "a"}, "no format fits the columns 'text'. Give the source a template, or rename the columns to"),
        ({"body": "a", "label": 0}, "(classification: a text (sentence, text) or two (sentence1 and sentence2"),
    ],
)
def test_what_is_no_labelled_text_is_refused(tmp_path: Path, row: dict[str, Any], words: str):
    assert words in refused(tmp_path, [row])


def test_limits_below_the_special_tokens_are_refused(tmp_path: Path):
    options: dict[str, Any] = {"on_long_row": "truncate", "max_length": 2}
    assert "2 tokens are too few for the text beside" in refused(tmp_path, rows_of(TEXTS[:1]), **options)
    options["max_length"] = 4  # of a pair [CLS] a [SEP] [SEP] would be left
    assert "4 tokens are too few for the text beside" in refused(tmp_path, rows_of(TEXTS[4:5]), **options)


# ── templates and files ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_template_writes_a_text_a_pair_and_a_label(tmp_path: Path):
    tokenizer = roberta()
    row = {"passage": "The river", "asked": "Is it a river?", "answer": True}
    template = {
        "prompt": "{{ asked }}",
        "pair": "{{ passage }}",
        "completion": " {{ 'positive' if answer else 'negative' }} ",
    }
    (example,) = load(tmp_path, [row], tokenizer=tokenizer, source={"template": template}).rows
    assert example.input_ids == tokenizer("Is it a river?", "The river")["input_ids"]
    assert example.targets == (1,)
    del template["pair"]
    (example,) = load(tmp_path, [row], tokenizer=tokenizer, source={"template": template}).rows
    assert example.input_ids == tokenizer("Is it a river?")["input_ids"]


def test_an_empty_text_of_a_templates_pair_is_refused_and_not_left_out(tmp_path: Path):
    template = {"prompt": "{{ a }}", "pair": "{{ b }}", "completion": "1"}
    for row in ({"a": "", "b": "x"}, {"a": "x", "b": ""}):
        assert "a text of the pair is empty" in refused(tmp_path, [row], source={"template": template})


def glue_rows(path: Path) -> list[dict[str, str]]:
    """GLUE's files hold no quotes: a line is a row."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


@pytest.mark.parametrize("split", ["train", "dev"])
@pytest.mark.parametrize(
    ("name", "texts", "label", "task"),
    [
        ("SST-2", ("sentence",), "label", NAMED),
        ("MRPC", ("#1 String", "#2 String"), "Quality", NAMED),
        ("STS-B", ("sentence1", "sentence2"), "score", NUMBERS),
    ],
)
def test_every_row_of_glues_files_is_an_example(
    shared: Path, name: str, split: str, texts: tuple[str, ...], label: str, task: RowTask
):
    path = shared / f"text/glue/{name}/{split}.tsv"
    wanted, tokenizer = glue_rows(path), real_bert()
    examples = load_task(task, path, tokenizer=tokenizer)
    assert examples.sources[0].format == "classification"
    assert len(examples.rows) == len(wanted) == examples.num_rows
    for at in range(0, len(wanted), max(len(wanted) // 60, 1)):
        found = examples.rows[at]
        assert found.targets == (float(wanted[at][label]),)
        expected = tokenizer(*(wanted[at][text] for text in texts))
        assert found.input_ids == expected["input_ids"]
        assert types_of(found.num_tokens, found.segment) == expected["token_type_ids"]
    assert tokenizer.model_input_names == TYPES


def test_mnli_and_anli_and_qqp_and_qnli_are_read_by_their_columns(tmp_path: Path):
    rows = [
        {"index": 0, "genre": "x", "sentence1": "a", "sentence2": "b", "label1": "neutral", "gold_label": "negative"},
        {"premise": "a", "hypothesis": "b", "label": 0, "reason": "c", "uid": "d"},
        {"id": 1, "qid1": 2, "question1": "a", "question2": "b", "is_duplicate": "0"},
        {"index": 3, "question": "a", "sentence": "b", "label": "negative"},
    ]
    for row in rows:
        (example,) = load(tmp_path, [row]).rows
        assert (example.input_ids, example.targets) == (bert()("a", "b")["input_ids"], (0,))
