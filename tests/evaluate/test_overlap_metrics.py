"""BLEU against sacrebleu over whole corpora and its formula; ROUGE against n-grams and subsequences counted plainly."""

from __future__ import annotations

import csv
import math
from collections import Counter, defaultdict
from itertools import zip_longest

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.evaluate.metrics import METRICS
from qlora_cli.evaluate.overlap_metrics import sentences

STEMS = {
    "cats": "cat",
    "cat": "cat",
    "jumped": "jump",
    "jumps": "jump",
    "Running,": "run",
    "the": "the",
    "on": "on",
    "7": "7",
}
TEXT = st.lists(st.sampled_from(sorted(STEMS)), max_size=8).map(" ".join)


def rows(name: str, predictions: list[str], references: list[list[str]]) -> np.ndarray:
    return METRICS[name].rows(predictions, references)


def figure(name: str, predictions: list[str], references: list[list[str]]) -> float:
    return METRICS[name].figure(rows(name, predictions, references))


def sacrebleu_of(predictions: list[str], references: list[list[str]]) -> float:
    streams = [list(stream) for stream in zip_longest(*references)]
    return sacrebleu.corpus_bleu(predictions, streams).score


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=3)), min_size=1, max_size=6))
def test_bleu_of_the_sums_is_sacrebleus_of_the_corpus(corpus):
    predictions, references = [text for text, _ in corpus], [list(texts) for _, texts in corpus]
    assert figure("bleu", predictions, references) == pytest.approx(sacrebleu_of(predictions, references), rel=1e-12)


def test_bleu_of_real_texts_and_of_a_resample_is_sacrebleus(shared):
    path = shared / "text" / "e2e-nlg" / "devset.csv"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    texts = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            texts[row["mr"]].append(row["ref"])
    groups = [group for group in texts.values() if len(group) > 1][:200]
    predictions, references = [group[0] for group in groups], [group[1:] for group in groups]
    found = rows("bleu", predictions, references)
    assert METRICS["bleu"].figure(found) == pytest.approx(sacrebleu_of(predictions, references), rel=1e-12)
    draw = np.random.default_rng(0).integers(len(groups), size=len(groups))
    again = sacrebleu_of([predictions[i] for i in draw], [references[i] for i in draw])
    assert METRICS["bleu"].figure(found[draw]) == pytest.approx(again, rel=1e-12)
    assert 20 < again < 90


def test_bleu_is_the_formula_of_its_paper():
    prediction, reference = "the cat sat on the mat again", "the cat sat on a mat for the whole day"
    precisions = []
    for n in range(1, 5):
        grams, right = (ngrams(text.split(), n) for text in (prediction, reference))
        precisions.append((grams & right).total() / grams.total())
    assert min(precisions) > 0
    brevity = math.exp(1 - 10 / 7)
    expected = 100 * brevity * math.exp(sum(map(math.log, precisions)) / 4)
    assert figure("bleu", [prediction], [[reference]]) == pytest.approx(expected, rel=1e-12)


def ngrams(words: list[str], n: int) -> Counter:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def longest(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def f_measure(shared: int, prediction: int, reference: int) -> float:
    return 2 * shared / (prediction + reference) if shared else 0.0


@settings(max_examples=60, deadline=None)
@given(TEXT, st.lists(TEXT, min_size=1, max_size=3))
def test_rouge_is_counted_plainly(prediction, references):
    words = [STEMS[word] for word in prediction.split()]
    answers = [[STEMS[word] for word in text.split()] for text in references]
    for n in (1, 2):
        grams = ngrams(words, n)
        plain = max(f_measure((grams & ngrams(a, n)).total(), grams.total(), ngrams(a, n).total()) for a in answers)
        assert figure(f"rouge{n}", [prediction], [references]) == pytest.approx(plain, rel=1e-12)
    plain = max(f_measure(longest(words, answer), len(words), len(answer)) for answer in answers)
    assert figure("rougeL", [prediction], [references]) == pytest.approx(plain, rel=1e-12)
    assert figure("rougeLsum", [prediction], [references]) == pytest.approx(plain, rel=1e-12)  # one sentence


def test_sentences_in_another_order_lose_rouge_l_and_keep_its_sum():
    prediction, reference = "Dogs bark loudly. Cats sleep all day!", "Cats sleep all day! Dogs bark loudly."
    assert figure("rougeLsum", [prediction], [[reference]]) == pytest.approx(1.0)
    assert figure("rougeL", [prediction], [[reference]]) == pytest.approx(4 / 7)


def test_rouge_l_sum_is_the_example_of_lin_2004():
    """Section 3.2: the union of the subsequences is w1 w2 w3 w5, recall 4/5; here precision is 4/10."""
    prediction, reference = "w1 w2 w6 w7 w8.\nw1 w3 w8 w9 w5.", "w1 w2 w3 w4 w5."
    assert figure("rougeLsum", [prediction], [[reference]]) == pytest.approx(2 * 0.8 * 0.4 / 1.2)


def test_sentences_are_lines():
    assert sentences(" One. Two?  Three 3.5 e.g.this\nFour ") == "One.\nTwo?\nThree 3.5 e.g.this\nFour"
