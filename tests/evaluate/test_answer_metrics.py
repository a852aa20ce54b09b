"""Scores of answers against SQuAD's official script written out, and against the code of lm-evaluation-harness."""

from __future__ import annotations

import collections
import json
import re
import string
from pathlib import Path

import lm_eval
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.filters.extraction import RegexFilter
from lm_eval.tasks.mlqa.utils import exact_match_score, f1_score

from qlora_cli.errors import UserError
from qlora_cli.evaluate.answer_metrics import final_number
from qlora_cli.evaluate.metrics import METRICS

CONFIG = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml").read_text(encoding="utf-8"))
PIECES = ["the", "a", "An", "Cat", "cat", "sat.", "U.S.", "10%", "don't", "—", "the-end", "é", "...", "\t", "theory"]
TEXT = st.lists(st.sampled_from(PIECES), max_size=5).map(" ".join)


def score(name: str, prediction: str, answers: list[str]) -> float:
    return METRICS[name].figure(METRICS[name].rows([prediction], [answers]))


# evaluate-v2.0.py (rajpurkar.github.io/SQuAD-explorer), the functions that score one question


def official_normalize(text):
    text = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
    return " ".join(re.compile(r"\b(a|an|the)\b", re.UNICODE).sub(" ", text).split())


def official_f1(gold, prediction):
    gold_tokens = official_normalize(gold).split() if gold else []
    tokens = official_normalize(prediction).split() if prediction else []
    num_same = sum((collections.Counter(gold_tokens) & collections.Counter(tokens)).values())
    if len(gold_tokens) == 0 or len(tokens) == 0:
        return int(gold_tokens == tokens)
    if num_same == 0:
        return 0
    precision, recall = num_same / len(tokens), num_same / len(gold_tokens)
    return (2 * precision * recall) / (precision + recall)


def official_scores(golds, prediction):
    golds = [gold for gold in golds if official_normalize(gold)] or [""]
    exact = max(int(official_normalize(gold) == official_normalize(prediction)) for gold in golds)
    return exact, max(official_f1(gold, prediction) for gold in golds)


@settings(deadline=None)
@given(TEXT, st.lists(TEXT, min_size=1, max_size=4))
def test_squad_is_the_official_script(prediction, answers):
    exact, f1 = official_scores(answers, prediction)
    assert score("squad_exact_match", prediction, answers) == exact
    assert score("squad_f1", prediction, answers) == pytest.approx(f1, rel=1e-12)


@settings(deadline=None)
@given(TEXT.filter(official_normalize), st.lists(TEXT.filter(official_normalize), min_size=1, max_size=3))
def test_squad_is_lm_evals_where_all_have_words(prediction, answers):
    """MLQA's English scorer, which is SQuAD v1.1's with Unicode's punctuation removed too."""
    prediction, answers = prediction.replace("—", "x"), [answer.replace("—", "x") for answer in answers]
    exact = max(exact_match_score(prediction, answer, "en") for answer in answers)
    assert score("squad_exact_match", prediction, answers) == float(exact)
    best = max(f1_score(prediction, answer, "en") for answer in answers)
    assert score("squad_f1", prediction, answers) == pytest.approx(best, rel=1e-12)


@settings(deadline=None)
@given(TEXT, st.lists(TEXT, min_size=1, max_size=3))
def test_an_exact_match_has_the_best_squad_f1(prediction, answers):
    exact, squad = score("exact_match", prediction, answers), score("squad_exact_match", prediction, answers)
    f1 = score("squad_f1", prediction, answers)
    assert 0.0 <= squad <= f1 <= 1.0
    if squad:
        assert f1 == 1.0
    if exact and official_normalize(prediction):
        assert squad == 1.0


def test_squad_by_hand():
    assert score("squad_exact_match", "The Eiffel-Tower!", ["eiffeltower"]) == 1.0
    assert score("squad_f1", "in the old town of Bern", ["old town", "Bern"]) == pytest.approx(2 * 2 / (5 + 2))
    assert score("squad_f1", "yes yes no", ["yes no no"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("nothing", [[""], [], ["the"]])
def test_a_question_without_an_answer_wants_silence(nothing):
    for name in ("squad_exact_match", "squad_f1"):
        assert score(name, "", nothing) == 1.0
        assert score(name, " The ", nothing) == 1.0
        assert score(name, "Bern", nothing) == 0.0
        assert score(name, "", ["Bern"]) == 0.0


def test_an_exact_match_forgives_white_space_at_the_ends_only():
    assert score("exact_match", " two words\n", ["one", "two words"]) == 1.0
    assert score("exact_match", "two  words", ["two words"]) == 0.0
    assert score("exact_match", "Two words", ["two words"]) == 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("16 - 3 = 13\n#### 18", "18"),
        ("#### 1,234.", "1234"),
        ("####$70,000.00", "70000.00"),
        ("#### -5 apples, of 7", "-5"),
        ("#### 18\n\nQuestion: How many? 4 + 4\n#### 8", "18"),
        ("#### eighteen, that is 18", "18"),
        ("She makes $18 a day.", "18"),
        ("9 * 2 = 18... so it is 18...", "18"),
        ("it is 5.5", "5.5"),
        ("from 3 to -2", "-2"),
        ("I do not know, ...", None),
        ("", None),
    ],
)
def test_the_final_number_by_hand(text, number):
    assert final_number(text) == number


def test_gsm8k_compares_numbers_as_they_are_written():
    assert score("gsm8k", "so $1,000.", ["...\n#### 1000"]) == 1.0
    assert score("gsm8k", "1000.00", ["1000"]) == 0.0  # GSM8K and lm-eval say the same
    assert score("gsm8k", "none", ["1000"]) == 0.0


NUMBERS = st.builds(
    lambda number, shape, dot: shape(number) + dot,
    st.integers(-99_999, 99_999),
    st.sampled_from([str, "{:,}".format, lambda n: f"{n / 4:.2f}"]),
    st.sampled_from(["", "."]),
)
REASONING = st.lists(st.one_of(st.sampled_from(["She has", "Apples and", "= $12,", "x"]), NUMBERS), max_size=5).map(
    " ".join
)


@settings(deadline=None)
@given(REASONING, NUMBERS, st.sampled_from(["", "\nQuestion: 5 more?\n#### 77"]), NUMBERS)
def test_gsm8k_is_lm_evals(reasoning, number, more, gold):
    """With the mark as its strict-match, without as its flexible-extract: patterns and clean-up from its own file."""
    gold = f"3 + 3 = 6\n#### {gold.rstrip('.')}"
    for text, which in (
        (f"{reasoning}\n#### {number}{more}", "strict-match"),
        (f"{reasoning} {number}", "flexible-extract"),
    ):
        for reference in (gold, f"\n#### {number.rstrip('.')}"):
            assert score("gsm8k", text, [reference]) == lm_eval_gsm8k(which, text, reference), (text, reference)


def lm_eval_gsm8k(which: str, text: str, reference: str) -> float:
    [filters] = [entry["filter"] for entry in CONFIG["filter_list"] if entry["name"] == which]
    arguments = {key: value for key, value in filters[0].items() if key != "function"}
    [[found]] = RegexFilter(**arguments).apply([[text]], [{}])
    [metric] = CONFIG["metric_list"]
    ignored, case = metric["regexes_to_ignore"], metric["ignore_case"]
    return float(exact_match_hf_evaluate([found], [reference], ignored, case)["exact_match"])


def test_every_answer_of_gsm8k_has_its_number(shared):
    path = shared / "text" / "gsm8k" / "test.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    answers = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    numbers = [answer.split("#### ")[1].strip().replace(",", "") for answer in answers]
    assert [final_number(answer) for answer in answers] == numbers
    metric = METRICS["gsm8k"]
    assert metric.figure(metric.rows(answers, [[number] for number in numbers])) == 1.0
    others = [[number] for number in numbers[1:] + numbers[:1]]
    same = sum(other == [number] for other, number in zip(others, numbers, strict=True))
    assert metric.figure(metric.rows(answers, others)) == pytest.approx(same / len(numbers))
    unmarked = [answer.split("####")[0] for answer in answers]
    last = [lm_eval_gsm8k("flexible-extract", text, gold) for text, gold in zip(unmarked, answers, strict=True)]
    assert metric.rows(unmarked, [[answer] for answer in answers])[:, 0].tolist() == last


def test_an_answer_without_a_number_is_a_message():
    with pytest.raises(UserError, match=r"metric gsm8k: the answer 'many' has no number\. Use exact_match"):
        score("gsm8k", "5", ["5", "many"])


def test_one_answer_instead_of_a_list_is_our_mistake():
    with pytest.raises(AssertionError, match="a list of answers, not one"):
        METRICS["exact_match"].rows(["a"], ["a"])
    with pytest.raises(AssertionError, match="a list of answers for each prediction"):
        METRICS["exact_match"].rows(["a", "b"], [["a"]])
