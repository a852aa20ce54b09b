"""Sources and targets: transformers' own ids, its truncation of a source, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from task_rows_loading import load_task, refused_task
from task_tokenizers import TOKENIZERS, roberta, t5

from qlora_cli.data.encode import IGNORE_INDEX
from qlora_cli.data.examples import Examples
from qlora_cli.data.formats import choose_format
from qlora_cli.data.pairs import FORMATS

TEXTS = [
    ("The capital of France is Paris.", "Paris"),
    ("Who wrote the play? ", " William Shakespeare, in 1600"),
    ("a", "b"),
    ("the river Seine " * 20, "two million people " * 9),
]
ROWS = [{"source": source, "target": target} for source, target in TEXTS]


def load(tmp_path: Path, rows: list[Any], **options: Any) -> Examples:
    return load_task("seq2seq_lm", tmp_path, rows, **options)


def refused(tmp_path: Path, rows: list[Any], **options: Any) -> str:
    return refused_task("seq2seq_lm", tmp_path, rows, **options)


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if "bert" not in name or "roberta" in name])
def test_the_ids_are_those_of_transformers_with_an_end(name: str, tmp_path: Path):
    tokenizer = TOKENIZERS[name]()
    examples = load(tmp_path, ROWS, tokenizer=tokenizer)
    for example, (source, target) in zip(examples.rows, TEXTS, strict=True):
        read = tokenizer(source)["input_ids"]
        written = tokenizer(text_target=target)["input_ids"]
        if written[-1] != tokenizer.eos_token_id:  # a decoder's tokenizer adds none
            written.append(tokenizer.eos_token_id)
        assert example.input_ids == read + written
        assert example.labels == [IGNORE_INDEX] * len(read) + written
        assert (example.num_prompt, example.num_trained) == (len(read), len(written))


@pytest.mark.parametrize("name", ["t5", "roberta", "real t5", "real roberta"])
@pytest.mark.parametrize("longest", [4, 7, 12])
def test_a_source_is_cut_as_transformers_cuts_it_and_a_target_loses_its_end(name: str, longest: int, tmp_path: Path):
    tokenizer = TOKENIZERS[name]()
    limits = {"source_max_length": longest, "target_max_length": longest, "on_long_row": "truncate"}
    examples = load(tmp_path, ROWS, tokenizer=tokenizer, **limits)
    cut = lost = 0
    for example, (source, target) in zip(examples.rows, TEXTS, strict=True):
        read = tokenizer(source, truncation=True, max_length=longest)["input_ids"]
        written = tokenizer(text_target=target)["input_ids"]
        assert example.input_ids == read + written[:longest]
        whole = tokenizer(source)["input_ids"] + written
        cut += len(whole) > example.num_tokens
        lost += len(whole) - example.num_tokens
    assert (examples.num_truncated, examples.num_cut_tokens) == (cut, lost)
    rows = "1 row" if cut == 1 else f"{cut} rows"
    assert f"{rows} truncated: {lost} tokens cut, " in "\n".join(examples.losses())


def test_long_pairs_are_left_out_or_an_error_that_names_the_keys_that_were_set(tmp_path: Path):
    examples = load(tmp_path, ROWS, max_length=40, on_long_row="skip")
    assert (len(examples.rows), examples.num_skipped) == (3, 1)
    assert "1 row left out: too long" in examples.losses()
    message = refused(tmp_path, ROWS, max_length=40)
    assert f"{tmp_path}/rows.jsonl:4: the row has " in message
    assert " of the source), but data.max_length is 40, for the source and for the target; in all 1 of 4" in message
    message = refused(tmp_path, ROWS, source_max_length=100, target_max_length=20)
    assert "but data.source_max_length is 100 and target_max_length 20" in message


@pytest.mark.parametrize(
    ("row", "source", "target"),
    [
        ({"source": "a b", "target": "c"}, "a b", "c"),
        ({"prompt": "a b", "completion": "c"}, "a b", "c"),
        ({"input": "a b", "output": "c"}, "a b", "c"),
        ({"question": "a b", "answer": "c"}, "a b", "c"),
        ({"document": "a b", "summary": "c", "id": "7"}, "a b", "c"),
        ({"article": "a b", "highlights": "c"}, "a b", "c"),
        ({"instruction": "a", "input": "b", "output": "c"}, "a\nb", "c"),
        ({"instruction": "a b", "input": "", "output": "c"}, "a b", "c"),
    ],
)
def test_every_format_is_chosen_by_its_columns(tmp_path: Path, row: dict[str, str], source: str, target: str):
    tokenizer = t5()
    (example,) = load(tmp_path, [row], tokenizer=tokenizer).rows
    assert example.input_ids == tokenizer(source)["input_ids"] + tokenizer(target)["input_ids"]


def test_a_template_writes_both(tmp_path: Path):
    tokenizer = roberta()
    template = {"prompt": "summarise: {{ mr }}", "completion": "{{ ref }}"}
    (example,) = load(tmp_path, [{"mr": "a", "ref": "b"}], tokenizer=tokenizer, source={"template": template}).rows
    assert example.input_ids == tokenizer("summarise: a")["input_ids"] + tokenizer("b")["input_ids"]


def test_real_rows_of_the_e2e_challenge_are_all_read(shared: Path, tmp_path: Path):
    import csv

    path = shared / "text/e2e-nlg/devset.csv"
    with path.open(newline="") as file:
        wanted = [(row["mr"], row["ref"]) for row in csv.DictReader(file)]
    tokenizer = TOKENIZERS["real t5"]()
    source = {"template": {"prompt": "{{ mr }}", "completion": "{{ ref }}"}}
    examples = load_task("seq2seq_lm", path, tokenizer=tokenizer, source=source)
    assert len(examples.rows) == len(wanted) == examples.num_rows
    for at in range(0, len(wanted), 97):
        assert examples.rows[at].input_ids == [token for text in wanted[at] for token in tokenizer(text)["input_ids"]]


def test_characters_that_the_tokenizer_cannot_write_are_counted_in_both(tmp_path: Path):
    rows = [{"source": "a 猫", "target": "b"}, {"source": "c", "target": "猫"}, {"source": "é", "target": "猫 猫"}]
    assert load(tmp_path, rows).lost_characters == (("猫", 3), ("é", 1))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"source": "", "target": "b"}], "rows.jsonl:1: the source is empty. Give the row a text to read."),
        ([{"source": " \n", "target": "b"}], "rows.jsonl:1: the source is empty"),
        ([{"source": 3, "target": "b"}], "rows.jsonl:1: source is the number 3, not a text"),
        ([{"source": "a", "target": None}], "rows.jsonl:1: no format fits the columns 'source'"),
        (
            [{"source": "a", "target": "b", "input": "c", "output": "d"}],
            "fit source_target and input_output. Set format: source_target or input_output.",
        ),
        ([{"text": "a"}], "no format fits the columns 'text'. Give the source a template, or rename the columns"),
        ([{"text": "a"}], "(source_target: source, target; prompt_completion: prompt, completion; input_output:"),
        (
            [{"source": "a", "target": "b", "system": "c"}],
            "has system, which the format source_target does not read. Remove system.",
        ),
        ([{"source": "a", "target": "b"}, {"input": "a", "output": "b"}], ":2: the columns 'input', 'output' fit"),
    ],
)
def test_what_is_no_pair_is_refused(tmp_path: Path, rows: list[Any], words: str):
    assert words in refused(tmp_path, rows)


def test_a_template_that_writes_nothing_or_half_a_character_is_refused(tmp_path: Path):
    template = {"prompt": "{{ a }}", "completion": "{{ b }}"}
    assert "the source is empty" in refused(tmp_path, [{"a": "", "b": "c"}], source={"template": template})
    (tmp_path / "half.csv").write_text("a,b\nx,y\n")
    half = {"prompt": "{{ '\\ud83d' }}", "completion": "{{ b }}"}
    message = refused_task("seq2seq_lm", tmp_path / "half.csv", source={"template": half})
    assert "template.prompt holds half of a character" in message or "no valid Jinja" in message


def test_a_limit_below_the_special_tokens_is_refused(tmp_path: Path):
    limits = {"source_max_length": 2, "target_max_length": 9, "on_long_row": "truncate"}
    message = refused(tmp_path, [{"source": "a long one", "target": "b"}], tokenizer=roberta(), **limits)
    assert "2 tokens are too few for the text beside its special tokens. Raise the length limit." in message


def test_a_dialogue_that_only_causal_lm_tells_apart_is_a_text_like_any_other():
    assert choose_format({"input": "### Human: a", "output": "b"}, "a:1", FORMATS) == "input_output"


def test_rows_of_a_list_are_read_too(tmp_path: Path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    assert len(load_task("seq2seq_lm", tmp_path / "rows.json").rows) == len(ROWS)
