"""Scores of a text against its acceptable answers: exact match, SQuAD's, GSM8K's, a pattern's."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from qlora_cli.errors import UserError

Score = Callable[[str, Sequence[str]], float]
"""The score of a text against its acceptable answers, 0 to 1."""

MARKED = re.compile(r"####\s*(-?[$.,]*[0-9][$0-9.,]*)")
NUMBER = re.compile(r"-?[$0-9.,]+")
"""As lm-eval's `flexible-extract` of GSM8K finds them; runs without a digit are left out where it is used."""
PUNCTUATION = str.maketrans("", "", string.punctuation)


def pairs(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[tuple[str, list[str]]]:
    """Each prediction beside its acceptable answers."""
    assert len(predictions) == len(references) > 0, "a list of answers for each prediction"
    assert not any(isinstance(answers, str) for answers in references), "a list of answers, not one"
    return [(text, list(answers)) for text, answers in zip(predictions, references, strict=True)]


def rows(score: Score, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(n, 1) float64: the score of each prediction."""
    return np.array([[score(*pair)] for pair in pairs(predictions, references)], dtype=np.float64)


def exact(prediction: str, answers: Sequence[str]) -> float:
    """1 where the prediction is an answer but for white space at both ends."""
    return float(prediction.strip() in {answer.strip() for answer in answers})


def found(pattern: re.Pattern[str], prediction: str, answers: Sequence[str]) -> float:
    """1 where the pattern is found and its group 1, if it has one, is an answer but for white space at both ends."""
    match = pattern.search(prediction)
    if match is None or not pattern.groups:
        return float(match is not None)
    return 0.0 if match[1] is None else exact(match[1], answers)


def squad_words(text: str) -> list[str]:
    """The text in lower case without ASCII punctuation and articles, as words. Source: SQuAD's normalize_answer."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split()


def squad_answers(answers: Sequence[str]) -> list[list[str]]:
    """The words of the answers that have any, else one without words: the question has no answer.

    As evaluate-v2.0.py; evaluate-v1.1.py differs only where all that an answer holds is articles and punctuation.
    """
    return [words for words in map(squad_words, answers) if words] or [[]]


def squad_exact(prediction: str, answers: Sequence[str]) -> float:
    """1 where the prediction has the words of an answer, in order."""
    return float(squad_words(prediction) in squad_answers(answers))


def squad_f1(prediction: str, answers: Sequence[str]) -> float:
    """The best F1 of the words shared with an answer; where either has no words, 1 if neither has, else 0."""
    words = squad_words(prediction)

    def f1(answer: list[str]) -> float:
        shared = (Counter(words) & Counter(answer)).total()
        return 2 * shared / (len(words) + len(answer)) if words and answer else float(words == answer)

    return max(map(f1, squad_answers(answers)))


def final_number(text: str) -> str | None:
    """The number after the first "####", else the last of the text, without commas, $ and dots at its end.

    The first, as GSM8K's script takes it: a model that goes on with the next question does not lose the point. Numbers
    are compared as they are written, as GSM8K and lm-eval do: 18.00 is not 18. None where there is no number.
    """
    marked = MARKED.search(text)
    numbers = [marked[1]] if marked else [run for run in NUMBER.findall(text) if re.search("[0-9]", run)]
    return re.sub(r"[,$]", "", numbers[-1]).rstrip(".") if numbers else None


def gsm8k(prediction: str, answers: Sequence[str]) -> float:
    """1 where the final number is that of an answer. Raises UserError where an answer has none."""
    right = [final_number(answer) for answer in answers]
    if None in right:
        what = f"the answer {answers[right.index(None)][:80]!r} has no number"
        raise UserError("metric gsm8k", what, "use exact_match or squad_f1 for answers in words")
    return float(final_number(prediction) in right)
