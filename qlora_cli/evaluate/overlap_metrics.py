"""ROUGE and BLEU: n-grams and subsequences shared with the references."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from qlora_cli.evaluate.answer_metrics import pairs
from qlora_cli.evaluate.extra import library


def rouge_rows(name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(n, 1) float64: F-measure 0 to 1 of each row against the reference where it is highest; name as rouge-score's.

    Stemmed, as the papers and transformers' summarisation examples do. rouge-score reads ASCII letters and digits
    only: a text in another script has no words and scores 0.
    """
    scorer = library("rouge_score.rouge_scorer").RougeScorer([name], use_stemmer=True)
    found = pairs(predictions, references)
    if name == "rougeLsum":
        found = [(sentences(text), [sentences(answer) for answer in answers]) for text, answers in found]
    return np.array([[scorer.score_multi(answers, text)[name].fmeasure] for text, answers in found], dtype=np.float64)


def sentences(text: str) -> str:
    """The text with a line for each sentence: broken where it has lines already, and after . ! ? before white space.

    transformers' examples break by NLTK's punkt, whose data is a download; this rule also breaks after "Mr."
    """
    return re.sub(r"(?<=[.!?])\s+", "\n", text.strip())


def bleu_rows(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(n, 10) float64, what BLEU needs of each row: n-grams of 1 to 4 words that match, that there are, two lengths.

    The lengths are in words: of the prediction, and of the reference nearest to it. sacrebleu's defaults, whatever the
    number of references of a row.
    """
    scorer = library("sacrebleu.metrics").BLEU(effective_order=True)  # of single rows; changes no count
    found = [scorer.sentence_score(text, answers) for text, answers in pairs(predictions, references)]
    return np.array([[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in found], dtype=np.float64)


def bleu(rows: np.ndarray) -> float:
    """Corpus BLEU, 0 to 100, of the summed rows; 0 where nothing matches."""
    sums = rows.sum(axis=0).astype(np.int64).tolist()
    score = library("sacrebleu.metrics").BLEU.compute_bleu(*(sums[:4], sums[4:8], *sums[8:]), smooth_method="exp")
    return float(score.score)
