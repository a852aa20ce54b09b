"""GLUE's metrics of classes against the formulas written out and against scikit-learn."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn

from qlora_cli.errors import UserError
from qlora_cli.evaluate.metrics import METRICS


def figure(name: str, predictions: list[int], references: list[int]) -> float:
    return METRICS[name].figure(METRICS[name].rows(predictions, references))


def rows_of(classes: int) -> st.SearchStrategy:
    ids = st.integers(0, classes - 1)
    return st.lists(st.tuples(ids, ids), min_size=1, max_size=40).map(
        lambda rows: [list(side) for side in zip(*rows, strict=True)]
    )


@settings(deadline=None)
@given(rows_of(2))
def test_two_classes_are_the_formulas_of_the_contingency_table(rows):
    predicted, right = rows
    pairs = list(zip(predicted, right, strict=True))
    tp, fp, fn, tn = (pairs.count(cell) for cell in [(1, 1), (1, 0), (0, 1), (0, 0)])
    precision, recall = tp / (tp + fp) if tp + fp else 0.0, tp / (tp + fn) if tp + fn else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    sides = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    assert figure("accuracy", *rows) == pytest.approx((tp + tn) / len(pairs), rel=1e-12)
    assert figure("f1", *rows) == pytest.approx(f1, rel=1e-12)
    assert figure("matthews", *rows) == pytest.approx(
        (tp * tn - fp * fn) / math.sqrt(sides) if sides else 0.0, rel=1e-9
    )


@settings(deadline=None)
@given(rows_of(2))
def test_f1_is_scikit_learns_with_nothing_as_zero(rows):
    assert figure("f1", *rows) == pytest.approx(sklearn.f1_score(rows[1], rows[0], zero_division=0), rel=1e-12)


@pytest.mark.filterwarnings("ignore:A single label was found")
@settings(deadline=None)
@given(rows_of(5))
def test_any_number_of_classes_is_scikit_learns(rows):
    predicted, right = rows
    assert figure("accuracy", *rows) == pytest.approx(sklearn.accuracy_score(right, predicted), rel=1e-12)
    macro = sklearn.f1_score(right, predicted, average="macro", zero_division=0)
    assert figure("macro_f1", *rows) == pytest.approx(macro, rel=1e-12)
    assert figure("matthews", *rows) == pytest.approx(sklearn.matthews_corrcoef(right, predicted), rel=1e-9, abs=1e-12)


def test_a_hand_case():
    predicted, right = [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 1]
    assert figure("f1", predicted, right) == pytest.approx(2 / 3)
    assert figure("matthews", predicted, right) == pytest.approx(1 / 3)
    assert figure("macro_f1", [0, 1, 2, 2], [0, 1, 2, 3]) == pytest.approx((1 + 1 + 2 / 3 + 0) / 4)


@pytest.mark.parametrize("constant", [0, 1])
def test_a_model_that_always_says_the_same_has_no_correlation(constant):
    assert figure("matthews", [constant] * 4, [0, 1, 1, 0]) == 0.0
    assert figure("f1", [0] * 4, [0] * 4) == 0.0


def test_many_classes_and_rows_overflow_nothing():
    ids = [index % 3000 for index in range(90_000)]
    assert figure("matthews", ids, ids) == pytest.approx(1.0)
    assert figure("macro_f1", ids, ids) == 1.0


def test_hidden_labels_are_a_message():
    with pytest.raises(UserError, match=r"labels: row 1 has -1 as its right class, .* labels are published"):
        figure("accuracy", [0, 1], [0, -1])
    with pytest.raises(UserError, match=r"row 0 has 0.5 as its predicted class"):
        figure("matthews", [0.5], [1])


def test_f1_of_three_classes_names_macro_f1():
    with pytest.raises(UserError, match=r"f1 is of the classes 0 and 1, and there is class 2\. Use macro_f1"):
        figure("f1", [0, 1], [0, 2])


def test_a_prediction_is_missing_is_our_mistake():
    with pytest.raises(AssertionError, match="a prediction for each reference"):
        figure("accuracy", [0], [0, 1])
    with pytest.raises(AssertionError, match="a prediction for each reference"):
        figure("accuracy", [], [])
