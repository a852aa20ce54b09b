"""Whether a text is JSON, and which value it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from qlora_cli.errors import UserError
from qlora_cli.evaluate.answer_metrics import pairs


def number(text: str) -> tuple[str, Decimal]:
    """Equal to that of any other spelling of the number (1, 1.0, 10e-1) and to nothing else: in Python True is 1."""
    return "number", Decimal(text)


def not_json(text: str) -> Any:
    """NaN and Infinity, which Python reads and RFC 8259 has not."""
    raise ValueError(text)


def value_of(text: str) -> tuple[Any] | None:
    """The JSON value, in a tuple since it may be null; None where the text is not one, white space around it aside.

    A code fence around it is not JSON; nor, here, is nesting deeper than Python's parser goes (about 1,000 levels).
    """
    try:
        return (json.loads(text, parse_int=number, parse_float=number, parse_constant=not_json),)
    except (ValueError, ArithmeticError, RecursionError):
        return None


def valid_rows(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(n, 1) float64: 1 where the prediction is JSON; the references are not read."""
    assert len(predictions) > 0, "no predictions"
    return np.array([[value_of(text) is not None] for text in predictions], dtype=np.float64)


def equal_rows(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(n, 1) float64: 1 where the prediction is JSON of the same value as an answer: keys in any order, 1 equal to 1.0.

    Raises UserError where an answer is not JSON.
    """
    result = np.zeros((len(predictions), 1))
    for index, (prediction, answers) in enumerate(pairs(predictions, references)):
        right = [value_of(answer) for answer in answers]
        if None in right:
            what = f"the answer {answers[right.index(None)][:80]!r} of row {index} is not JSON"
            raise UserError("metric json_equal", what, "mend the row, or use json_valid or exact_match")
        result[index] = value_of(prediction) in right
    return result
