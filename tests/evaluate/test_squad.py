"""Answers are the spans that transformers' run_qa.py would choose from the same logits, whatever the batch size."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_cli.data.examples import load_examples
from qlora_cli.data.row_task import RowTask
from qlora_cli.errors import UserError
from qlora_cli.evaluate.metrics import METRICS
from qlora_cli.evaluate.squad import Asked, answer_questions, best_spans, read_questions
from qlora_cli.evaluate.squad_suite import open_squad
from qlora_cli.evaluate.suite import Context
from qlora_cli.model.base import Base, load_base
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.schema import Source, Suite
from tests.architectures import write_architecture

CPU = torch.device("cpu")
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
MAX_LENGTH, STRIDE, LONGEST = 40, 8, 5
WORDS = str.split("Anna Ben ball box Haus grün über the a in on red was put where café x1 42 (old) 'tis end-of-day")


def wordpiece() -> Tokenizer:
    """BERT's kind: lower case, no accents, words split into letters."""
    letters = sorted(set("".join(WORDS).lower()) | set("abcdefghijklmnopqrstuvwxyz0123456789.,?()'-"))
    pieces = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), "anna", "ball", "the", "red", "where", "##ll"]
    tokenizer = Tokenizer(models.WordPiece({piece: at for at, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer


def bytewise() -> Tokenizer:
    """RoBERTa's kind: a token per byte, two separators between the texts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "b"), ("a", "l")]
    pieces = [*SPECIAL, *alphabet, *("".join(pair) for pair in merged)]
    tokenizer = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, merged))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.RobertaProcessing(("[SEP]", 2), ("[CLS]", 1), add_prefix_space=False)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {"bert": wordpiece, "roberta": bytewise}


def row_of(rng: random.Random, index: int) -> dict[str, Any]:
    """A question whose context is read in one window to six."""
    parts = [rng.choice(WORDS) for _ in range(rng.choice((2, 6, 12, 40)))]
    context = " ".join(parts)
    first = rng.randrange(len(parts))
    text = " ".join(parts[first : first + rng.randint(1, 2)])
    answer = {"text": text, "answer_start": len(" ".join([*parts[:first], ""]))}
    question = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 3))) + "?"
    return {"id": f"q{index}", "context": context, "question": question, "answers": [answer]}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_of(model: Path, rows: Path, **data: Any) -> Recipe:
    """A recipe without quantisation in float32, whose held-out rows are `rows` unless `data` says otherwise."""
    settings = {"train": [{"path": str(rows)}], "max_length": MAX_LENGTH, "doc_stride": STRIDE}
    return Recipe.model_validate(
        {
            "model": {"name_or_path": str(model), "task": "question_answering"},
            "quantization": {"data_type": "none", "compute_dtype": "float32"},
            "evaluation": {"max_answer_length": LONGEST},
            "data": {**settings, **({} if "eval_fraction" in data else {"eval": [{"path": str(rows)}]}), **data},
        }
    )


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A random model of the kind with its own tokenizer, and forty questions, one of which in four is long."""
    folder = tmp_path_factory.mktemp(request.param)
    names = {f"{name[1:-1].lower()}_token": name for name in SPECIAL}
    reads = ["input_ids", "attention_mask", *(["token_type_ids"] if request.param == "bert" else [])]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS[request.param](), model_input_names=reads, **names)
    write_architecture(folder / "model", request.param, vocab_size=len(tokenizer), initializer_range=0.3)
    tokenizer.save_pretrained(folder / "model")
    rng = random.Random(5)
    rows = [row_of(rng, index) for index in range(40)]
    path = write_rows(folder / "rows.jsonl", rows)
    recipe = recipe_of(folder / "model", path)
    base = load_base(recipe, CPU)
    return SimpleNamespace(
        folder=folder, rows=rows, path=path, recipe=recipe, base=base, asked=read_questions([], base, recipe, None)
    )


def answers_of(base: Base, asked: list[Asked], size: int = 7, model: Any = None) -> list[dict[str, Any]]:
    """The answers in the questions' order."""
    found = dict(answer_questions(base, model or base.model, asked, size, LONGEST))
    return [found[row] for row in range(len(asked))]


# ── the reference: run_qa.py's features, one at a time, and utils_qa.py's choice among their logits ──────────────────


def features_of(case: SimpleNamespace, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The windows of a row as transformers' own tokenizer makes them."""
    tokenizer = AutoTokenizer.from_pretrained(case.folder / "model")
    found = tokenizer(
        row["question"],
        row["context"],
        truncation="only_second",
        max_length=MAX_LENGTH,
        stride=STRIDE,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    features = []
    for at in range(len(found["input_ids"])):
        sides = found.sequence_ids(at)
        offsets = [span if side == 1 else None for span, side in zip(found["offset_mapping"][at], sides, strict=True)]
        inputs = {name: torch.tensor([found[name][at]]) for name in tokenizer.model_input_names}
        features.append({"inputs": inputs, "offsets": offsets})
    return features


@torch.no_grad()
def logits_of(case: SimpleNamespace, feature: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    found = case.base.model(**feature["inputs"])
    return found.start_logits[0].numpy(), found.end_logits[0].numpy()


def chosen(context: str, features: list[Any], logits: list[Any], with_null: bool) -> tuple[str, float | None, float]:
    """Text and score of the answer, and the least score of the null, as utils_qa.py has them; "" where it has none."""
    spans, nulls = [], []
    for feature, (starts, ends) in zip(features, logits, strict=True):
        nulls.append(starts[0] + ends[0])
        offsets = feature["offsets"]
        for first in np.argsort(starts)[-1:-21:-1]:
            for last in np.argsort(ends)[-1:-21:-1]:
                inside = offsets[first] is not None and offsets[last] is not None
                if inside and 0 <= last - first < LONGEST:
                    spans.append((starts[first] + ends[last], context[offsets[first][0] : offsets[last][1]]))
    null = float(min(nulls))
    if not spans:
        return "", None, null
    score, text = max(spans, key=lambda span: span[0])
    return ("" if with_null and null - score > 0 else text), float(score), null


def expected(case: SimpleNamespace, with_null: bool = False) -> list[tuple[str, float | None, float]]:
    found = []
    for row in case.rows:
        features = features_of(case, row)
        found.append(chosen(row["context"], features, [logits_of(case, one) for one in features], with_null))
    return found


def test_the_answers_are_those_of_utils_qa(case: SimpleNamespace) -> None:
    assert max(len(one.windows) for one in case.asked) > 3
    for answer, row, (text, score, _) in zip(answers_of(case.base, case.asked), case.rows, expected(case), strict=True):
        assert answer["prediction"] == text
        assert answer["score"] == pytest.approx(score, abs=1e-4)
        assert answer["null_score"] is None
        assert (answer["id"], answer["question"]) == (row["id"], row["question"])
        assert answer["references"] == [row["answers"][0]["text"]]
        assert json.loads(json.dumps(answer)) == answer


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 12), st.integers(0, 20))
def test_the_best_span_is_the_one_that_loops_find(seed: int, length: int, longest: int, padding: int) -> None:
    rng = np.random.default_rng(seed)
    starts, ends = (rng.permutation(length).astype(np.float32) + rng.random(1, np.float32) for _ in range(2))
    offsets = [(at, at + 1) if rng.random() < 0.6 else None for at in range(length)]
    best: tuple[float, Any] = (-np.inf, None)
    for first in np.argsort(starts)[-1:-21:-1]:
        for last in np.argsort(ends)[-1:-21:-1]:
            legal = offsets[first] is not None and offsets[last] is not None and 0 <= last - first < longest
            if legal and starts[first] + ends[last] > best[0]:
                best = (starts[first] + ends[last], (first, last))
    behind = torch.full((1, padding), -torch.inf)
    logits = [torch.cat([torch.tensor(one)[None], behind], 1) for one in (starts, ends)]
    inside = torch.tensor([[*(span is not None for span in offsets), *[False] * padding]])
    first, last, score = (one.item() for one in best_spans(*logits, inside, longest))
    assert score == pytest.approx(best[0])
    if best[1] is not None:
        assert starts[int(first)] + ends[int(last)] == pytest.approx(best[0])
        assert offsets[int(first)] is not None
        assert 0 <= last - first < longest


def test_no_answer_changes_with_the_batch_size_or_with_its_neighbours(case: SimpleNamespace) -> None:
    whole = answers_of(case.base, case.asked)
    for size in (1, 3, 100):
        for one, other in zip(whole, answers_of(case.base, case.asked, size), strict=True):
            assert other == {**one, "score": pytest.approx(one["score"], abs=1e-4)}
    assert answers_of(case.base, [case.asked[9]])[0]["prediction"] == whole[9]["prediction"]


def test_the_windows_are_those_that_training_reads(case: SimpleNamespace) -> None:
    examples = load_examples(
        case.recipe.data,
        "eval",
        case.base.tokenizer,
        case.base.stop_token_ids,
        seed=0,
        today=date(2026, 1, 1),
        task=RowTask.of(case.recipe),
    )
    windows = [window.example for one in case.asked for window in one.windows]
    parts = [(one.input_ids, one.labels, one.targets, one.segment, one.where) for one in windows]
    assert parts == [(one.input_ids, one.labels, one.targets, one.segment, one.where) for one in examples.rows]


def test_without_sources_the_held_out_share_is_asked(case: SimpleNamespace) -> None:
    recipe = recipe_of(case.folder / "model", case.path, eval_fraction=0.4)
    chat = {"seed": recipe.training.seed, "today": date(2026, 1, 1), "task": RowTask.of(recipe)}
    held_out = load_examples(recipe.data, "eval", case.base.tokenizer, case.base.stop_token_ids, **chat)
    found = read_questions([], case.base, recipe, None)
    assert 0 < len(found) < 40
    assert {one.where for one in found} == {row.where for row in held_out.rows}


# ── questions without an answer ──────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def raised(base: Base, by: float) -> Iterator[None]:
    """The model with more on its first token's logits."""

    def add(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return torch.cat([logits[:, :1] + by, logits[:, 1:]], dim=1)

    hook = base.model.qa_outputs.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


def test_of_squad_2_the_null_wins_where_it_is_likelier_in_every_window(case: SimpleNamespace, tmp_path: Path) -> None:
    rows = [*case.rows, {**case.rows[0], "id": "none", "answers": {"text": [], "answer_start": []}}]
    both = SimpleNamespace(**{**vars(case), "rows": rows})
    asked = read_questions([Source(path=str(write_rows(tmp_path / "two.jsonl", rows)))], case.base, case.recipe, None)
    assert all(one.may_be_none for one in asked)
    gaps = [score - null for _, score, null in expected(both) if score is not None]
    with raised(case.base, by=float(np.median(gaps)) / 2):
        answers, reference = answers_of(case.base, asked), expected(both, with_null=True)
        again = answers_of(case.base, asked[1:2])  # alone, its data still has questions without answers
    for answer, (text, score, null) in zip(answers, reference, strict=True):
        assert answer["prediction"] == text
        assert (answer["score"], answer["null_score"]) == (
            pytest.approx(score, abs=1e-4),
            pytest.approx(null, abs=1e-4),
        )
    assert 0.2 < np.mean([answer["prediction"] == "" for answer in answers]) < 0.8
    assert answers[-1]["references"] == []
    assert again[0]["null_score"] == pytest.approx(answers[1]["null_score"], abs=1e-4)
    right = METRICS["squad_exact_match"].rows([answers[-1]["prediction"]], [[]])
    assert right[0, 0] == (answers[-1]["prediction"] == "")


def test_no_answer_may_be_given_whatever_the_limit(case: SimpleNamespace, tmp_path: Path) -> None:
    none = {**case.rows[9], "id": "none", "answers": {"text": [], "answer_start": []}}
    path = tmp_path / "two.jsonl"
    path.write_text("".join(f"{line}\n" for line in (json.dumps(case.rows[0]), "{broken", json.dumps(none))))
    plain, two = Source(path=str(case.path)), Source(path=str(path))
    for sources, limit, wanted in (
        ([two], 1, True),
        ([plain, two], 3, True),
        ([two, plain], 1, True),
        ([plain], 1, False),
        ([Source(path=str(path), limit=2)], 1, False),
    ):
        found = read_questions(sources, case.base, case.recipe, limit)
        assert [one.may_be_none for one in found] == [wanted] * limit
    with raised(case.base, by=1000.0):
        (answer,) = answers_of(case.base, read_questions([two], case.base, case.recipe, 1))
    assert answer["prediction"] == ""


def test_what_stands_behind_the_limit_is_in_the_digest_where_it_changes_answers(
    case: SimpleNamespace, tmp_path: Path
) -> None:
    none = {**case.rows[9], "answers": {"text": [], "answer_start": []}}
    digests = []
    for name, rows in (("a", case.rows[:2]), ("b", case.rows[:3]), ("c", [*case.rows[:2], none])):
        path = write_rows(tmp_path / f"{name}.jsonl", rows)
        digests.append(opened(case, case.recipe, limit=2, data=[Source(path=str(path))]).digest)
    assert digests[0] == digests[1] != digests[2]


# ── models that point at certain tokens ──────────────────────────────────────────────────────────────────────────────


class Pointer(torch.nn.Module):
    """A model that knows which token begins an answer and which ends it."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.first, self.last = first, last

    def forward(self, input_ids: torch.Tensor, **others: torch.Tensor) -> Any:
        noise = torch.arange(input_ids.shape[1]) / 1000
        logits = [noise - 3 + 9 * (input_ids == token) for token in (self.first, self.last)]
        return SimpleNamespace(start_logits=logits[0], end_logits=logits[1])


def token_of(base: Base, text: str) -> int:
    """The only token of a text that has but one."""
    (token,) = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    return int(token)


def test_an_answer_in_the_last_window_is_found_and_cut_out_of_the_context(
    case: SimpleNamespace, tmp_path: Path
) -> None:
    context = "über (old) café " * 20 + "7 , Grün! 8 (old)"
    answer = {"text": ["7 , Grün! 8"], "answer_start": [context.index("7")]}
    path = write_rows(tmp_path / "one.jsonl", [{"question": "who?", "context": context, "answers": answer}])
    asked = read_questions([Source(path=str(path))], case.base, case.recipe, None)
    assert len(asked[0].windows) > 3
    marks = ("7", "8") if case.base.model.config.model_type == "bert" else (" 7"[1:], "8")
    pointer = Pointer(*(token_of(case.base, mark) for mark in marks))
    longest = 12
    ((_, found),) = answer_questions(case.base, pointer, asked, 2, longest)
    assert found["prediction"] == "7 , Grün! 8"
    assert found["id"] == found["where"] == f"{path}:1"
    ((_, short),) = answer_questions(case.base, pointer, asked, 2, 4)
    assert "7" not in short["prediction"] or "8" not in short["prediction"]


def test_a_question_without_a_legal_span_has_an_empty_answer(case: SimpleNamespace, tmp_path: Path) -> None:
    row = {"question": "x " * 22, "context": "y", "answers": {"text": ["y"], "answer_start": [0]}}
    path = write_rows(tmp_path / "one.jsonl", [row])
    recipe = recipe_of(case.folder / "model", path, max_length=64)
    asked = read_questions([], case.base, recipe, None)

    class Question(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **others: torch.Tensor) -> Any:
            falling = -torch.arange(input_ids.shape[1]).float().expand(input_ids.shape)
            return SimpleNamespace(start_logits=falling, end_logits=falling)

    ((_, found),) = answer_questions(case.base, Question(), asked, 2, LONGEST)
    assert (found["prediction"], found["score"]) == ("", None)


def test_logits_that_are_no_numbers_end_it(case: SimpleNamespace) -> None:
    with (
        pytest.raises(UserError, match=r"rows.jsonl:\d+: the model's logits are not numbers"),
        raised(case.base, np.nan),
    ):
        answers_of(case.base, case.asked)


def test_the_models_mode_comes_back_and_gradients_stay_on_between_answers(case: SimpleNamespace) -> None:
    case.base.model.train()
    try:
        given = answer_questions(case.base, case.base.model, case.asked, 4, LONGEST)
        next(given)
        assert torch.is_grad_enabled()
        assert not case.base.model.training
        given.close()
        assert case.base.model.training
    finally:
        case.base.model.eval()


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_limit_counts_questions_of_all_sources_together(case: SimpleNamespace, tmp_path: Path) -> None:
    paragraphs = [{"context": row["context"], "qas": [row]} for row in case.rows[:6]]
    official = tmp_path / "dev.json"
    official.write_text(json.dumps({"version": "1.1", "data": [{"title": "x", "paragraphs": paragraphs}]}))
    sources = [Source(path=str(official), limit=3), Source(path=str(case.path))]
    for limit in (2, 3, 5):
        found = read_questions(sources, case.base, case.recipe, limit)
        assert [one.question.id for one in found] == ["q0", "q1", "q2", "q0", "q1"][:limit]
    assert read_questions([Source(path=str(official))], case.base, case.recipe, None)[5].question.id == "q5"


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "moved": (
        lambda row: row | {"answers": [{"text": row["context"][:2], "answer_start": 1}]},
        "is not at character 1",
    ),
    "column": (lambda row: {key: row[key] for key in ("context", "answers")}, "question"),
    "number": (lambda row: row | {"question": 3}, "question is the number 3"),
    "empty": (lambda row: row | {"question": " "}, "is empty"),
    "long": (lambda row: row | {"question": "x " * 50, "context": "the ball " * 50, "answers": []}, "leaves a window"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_with_its_line(case: SimpleNamespace, tmp_path: Path, name: str) -> None:
    change, what = BAD[name]
    rows = [case.rows[0], change(case.rows[1] | {"context": "Anna put it"}), case.rows[2]]
    path = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(UserError) as error:
        read_questions([Source(path=str(path))], case.base, case.recipe, None)
    assert str(error.value).startswith(f"{path}:2: ")
    assert what in str(error.value)
    left_out: list[UserError] = []
    skipping = recipe_of(case.folder / "model", path, on_bad_row="skip")
    found = read_questions([], case.base, skipping, None, left_out.append)
    assert [one.question.id for one in found] == ["q0", "q2"]
    assert [one.where for one in left_out] == [f"{path}:2"]


def test_several_bad_rows_are_told_at_once_and_none_behind_the_limit(case: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(case.rows[0])}\n{{broken\n[1]\n{json.dumps(case.rows[3])}\n")
    with pytest.raises(UserError) as error:
        read_questions([Source(path=str(path))], case.base, case.recipe, None)
    assert f"{path}:2" in str(error.value)
    assert f"{path}:3" in str(error.value)
    assert len(read_questions([Source(path=str(path))], case.base, case.recipe, 1)) == 1


def test_a_window_that_the_model_cannot_read_is_refused(case: SimpleNamespace) -> None:
    recipe = recipe_of(case.folder / "model", case.path, max_length=2048)
    positions = 71 if case.base.config.model_type == "roberta" else 72  # it counts from its padding on
    message = rf"rows.jsonl:\d+: a window takes \d+ tokens, the model has {positions} positions"
    with pytest.raises(UserError, match=message):
        read_questions([], case.base, recipe, None)


# ── the suite ────────────────────────────────────────────────────────────────────────────────────────────────────────


def opened(case: SimpleNamespace, recipe: Recipe, limit: int | None = None, **keys: Any) -> Any:
    """The suite over the recipe's held-out rows, or over `data`."""

    def none(sources: Any) -> Any:
        raise AssertionError("the suite reads its questions itself")

    return open_squad(Suite(suite="squad", **keys), Context(recipe, case.base, none, limit))


def test_the_suite_scores_the_answers_as_squad_does(case: SimpleNamespace) -> None:
    suite = opened(case, case.recipe, limit=12)
    assert suite.num_rows == 12
    answers = dict(suite.answer(case.base, case.base.model, [7, 3, 11]))
    whole = answers_of(case.base, case.asked)
    assert {row: answer["prediction"] for row, answer in answers.items()} == {
        row: whole[row]["prediction"] for row in (3, 7, 11)
    }
    right = [{**answer, "prediction": f"the {answer['references'][0].upper()}!"} for answer in answers.values()]
    for name in ("squad_exact_match", "squad_f1"):
        measure = suite.measures[name]
        assert measure.figure(measure.rows(right)) == 1
        assert 0 <= measure.figure(measure.rows(list(answers.values()))) <= 1
    assert {suite.group(answer) for answer in answers.values()} == {""}


def test_answers_are_kept_for_the_same_questions_and_settings_alone(case: SimpleNamespace) -> None:
    longer = case.recipe.model_copy(
        update={"evaluation": case.recipe.evaluation.model_copy(update={"max_answer_length": 7})}
    )
    other_windows = recipe_of(case.folder / "model", case.path, doc_stride=STRIDE + 1)
    digests = [opened(case, recipe, 12).digest for recipe in (case.recipe, longer, other_windows)]
    assert len({*digests, opened(case, case.recipe, 11).digest}) == 4
    assert opened(case, case.recipe, 12).digest == digests[0]


def test_of_squad_2_those_with_an_answer_and_those_without_are_told_apart(
    case: SimpleNamespace, tmp_path: Path
) -> None:
    rows = [case.rows[1], {**case.rows[1], "answers": []}]
    suite = opened(case, case.recipe, data=[Source(path=str(write_rows(tmp_path / "two.jsonl", rows)))])
    answers = dict(suite.answer(case.base, case.base.model, [0, 1]))
    assert [suite.group(answers[row]) for row in (0, 1)] == ["with an answer", "without an answer"]


def test_a_suite_whose_rows_are_all_left_out_says_so(case: SimpleNamespace, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "bad.jsonl", [{"question": "who?", "context": "me"}])
    recipe = recipe_of(case.folder / "model", path, on_bad_row="skip")
    with pytest.raises(UserError, match="squad: no rows"):
        opened(case, recipe)
