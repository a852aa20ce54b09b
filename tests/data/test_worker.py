"""Rows to results in this very process: what is kept, counted and refused, and that nothing else can come of a row."""

from __future__ import annotations

import io
import json
import pickle
import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from preparing import LONG, SHORT, make_job, make_task, numbered
from tiny_tokenizer import CHATML, tiny_chat, tiny_tokenizer

from qlora_cli.data import worker
from qlora_cli.data.chat import Chat, make_chat
from qlora_cli.data.encode import Example
from qlora_cli.data.limits import Limits
from qlora_cli.data.worker import MOST_WORDS, TRAINED, Job, Result, Task, prepare, shortened
from qlora_cli.errors import UserError

JOB = make_job()
CHAT = make_chat(JOB.settings)


def prepared(rows: list[Any], job: Job = JOB, chat: Chat = CHAT, template: dict[str, Any] | None = None) -> Result:
    return prepare(make_task(rows, template), job, chat)


def test_a_result_holds_ids_with_the_trained_ones_marked_and_counts() -> None:
    result = prepared([SHORT, {**SHORT, "answer": ""}])
    (one, two) = result.examples
    assert (one[0], two[0], one[1] + two[1]) == (0, 1, len(result.ids))
    trained = [token - TRAINED for token in result.ids if token >= TRAINED]
    assert tiny_tokenizer().decode(trained) == "42<|im_end|><|im_end|>"
    assert (one[2], two[2]) == (len(trained) - 1, 1)
    assert dict(+result.tally) == {"num_stops": 2, "num_silent": 1}
    assert result.bad == []


def test_characters_that_the_tokenizer_cannot_write_are_counted_by_rows() -> None:
    chat = tiny_chat(kind="pieces", spell_bytes=False)
    job = replace(JOB, settings=chat.settings)
    rows = [{"question": "aéé 4", "answer": "b"}, {"question": "a", "answer": "é🤗"}, {"question": "a", "answer": "b"}]
    assert prepared(rows, job, chat).lost == {"é": 2, "🤗": 1}
    assert prepared(rows).lost == {}


def test_bad_rows_stand_beside_the_others_once_each_in_order() -> None:
    result = prepared([numbered(0), {"question": 1, "answer": "a"}, numbered(2), {"question": "<s>", "answer": "a"}])
    assert [(index, where) for index, where, _, _ in result.bad] == [(1, "a:2"), (3, "a:4")]
    assert [index for index, *_ in result.examples] == [0, 2]
    assert all(what and todo for _, _, what, todo in result.bad)


def test_long_rows_are_the_first_and_the_longest() -> None:
    longer, longest = ({**LONG, "answer": LONG["answer"] * times} for times in (2, 3))
    job = make_job(limits=Limits(30))
    result = prepared([SHORT, longer, longest, longer], job)
    first, most = result.long
    assert (first[0], most[0]) == (1, 2)
    assert most[1] > first[1] > 30
    assert first[2] == most[2]
    assert result.tally["num_too_long"] == 3
    assert [index for index, *_ in result.examples] == [0]


def test_a_sources_template_is_read_with_all_columns() -> None:
    template = {
        "prompt": "{{ context }}|{{ items }}|{{ name }}:",
        "completion": " {{ args[0] | tojson }}",
        "chat": False,
    }
    result = prepared([{"context": "a", "items": "b", "name": "c", "args": [{"d": 1}]}], template=template)
    assert result.bad == []
    assert tiny_tokenizer().decode([token & (TRAINED - 1) for token in result.ids]) == 'a|b|c: {"d": 1}</s>'


def test_a_sources_template_that_stops_names_the_columns() -> None:
    template = {"prompt": "{{ quesion }}", "completion": "{{ answer }}", "chat": True}
    ((_, where, what, todo),) = prepared([SHORT], template=template).bad
    assert (where, todo) == ("a:1", "correct the template in the recipe, or the row")
    stopped = "template.prompt of its data source stops with: 'quesion' is undefined"
    assert what == f"{stopped}; the row has question, answer"


def test_a_sources_template_that_is_no_jinja_is_refused() -> None:
    with pytest.raises(UserError, match=r"a:1: template\.prompt of its data source is no valid Jinja: unexpected '%'"):
        prepared([SHORT], template={"prompt": "{% if %", "completion": "", "chat": True})


def test_a_template_with_chat_makes_turns() -> None:
    template = {"prompt": "{{ question }}!", "completion": "{{ answer }}", "chat": True}
    assert "<|im_start|>user\nHow many?!<|im_end|>" in tiny_tokenizer().decode(
        [token & (TRAINED - 1) for token in prepared([SHORT], template=template).ids]
    )


def test_messages_are_shortened_with_their_length() -> None:
    assert shortened("a" * MOST_WORDS) == "a" * MOST_WORDS
    assert shortened("a" * 10_000) == "a" * MOST_WORDS + "... (10,000 characters)"


def test_want_of_memory_is_never_told_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other rows of the task may have taken the memory: each is tried alone, in a process of its own."""

    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    chat = make_chat(make_job(tiny_tokenizer(template="{{ strftime_now('') }}" + CHATML)).settings)
    assert chat.compiled is not None
    monkeypatch.setitem(chat.compiled.environment.globals, "strftime_now", full)
    monkeypatch.setitem(chat.compiled.globals, "strftime_now", full)
    with pytest.raises(MemoryError):
        prepared([SHORT], chat=chat)


def test_a_row_never_depends_on_its_neighbours() -> None:
    rows = [numbered(number) for number in range(20)] + [{"question": 7}, LONG, {**SHORT, "answer": "x\n"}]
    together = prepared(rows)
    alone = [prepared([row]) for row in rows]
    assert together.ids.tolist() == [token for one in alone for token in one.ids]
    assert [example[1:] for example in together.examples] == [e[1:] for one in alone for e in one.examples]
    assert [index for index, *_ in together.bad] == [index for index, one in enumerate(alone) if one.bad]


# ── the frames ───────────────────────────────────────────────────────────────────────────────────────────────────────


class _Pipes:
    def __init__(self, told: bytes = b"") -> None:
        self.buffer = io.BytesIO(told)


def said_by(job: Job, tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The headers that the process answers with."""
    frames = [pickle.dumps(thing) for thing in (job, *tasks)]
    answers = _Pipes()
    monkeypatch.setattr(worker.sys, "stdin", _Pipes(b"".join(struct.pack("<Q", len(f)) + f for f in frames)))
    monkeypatch.setattr(worker.sys, "stdout", answers)
    monkeypatch.setattr(worker, "confine", lambda memory_bytes: None)
    worker.main()
    data, at, headers = answers.buffer.getvalue(), 0, []
    while at < len(data):
        text, ids = struct.unpack_from("<QQ", data, at)
        headers.append(json.loads(data[at + 16 : at + 16 + text]))
        at += 16 + text + ids
    return headers


def test_every_task_is_answered_until_the_input_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ready, first, broken, last = said_by(
        JOB, [make_task([SHORT]), make_task([SHORT], {"prompt": "{%", "completion": ""}), make_task([])], monkeypatch
    )
    assert ready == {"ready": True}
    assert [len(header["examples"]) for header in (first, last)] == [1, 0]
    assert broken["error"][1].startswith("template.prompt of its data source is no valid Jinja")


def test_a_template_that_is_no_jinja_is_answered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    (answer,) = said_by(make_job(tiny_tokenizer(template="\n{% for %}")), [], monkeypatch)
    where, what, todo = answer["error"]
    assert where == "the tokenizer's chat template:2"
    assert what.startswith("is no valid Jinja: ")
    assert todo == "correct the template"


def test_a_bug_is_answered_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "make_chat", lambda settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        said_by(JOB, [], monkeypatch)
    assert b"ZeroDivisionError" in worker.sys.stdout.buffer.getvalue()


# ── anything ─────────────────────────────────────────────────────────────────────────────────────────────────────────

TEXTS = st.text(max_size=30) | st.sampled_from(["", " ", "\n", "<s>", "<|im_end|>", "\U000f0000", "\ud800", "a" * 5000])
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "a", "content"]), inner),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", "cat"]) | JUNK, "content": TEXTS | JUNK},
        optional={"tool_calls": JUNK, "reasoning_content": TEXTS, "weight": JUNK, "name": TEXTS},
    ),
    max_size=5,
)
ANY_ROWS = {
    "question_answer": st.fixed_dictionaries({"question": TEXTS | JUNK, "answer": TEXTS | JUNK}),
    "messages": st.fixed_dictionaries({"messages": MESSAGES | JUNK}, optional={"tools": JUNK}),
    "text": st.fixed_dictionaries({}, optional={"text": TEXTS | JUNK}),
    "alpaca": st.fixed_dictionaries({}, optional=dict.fromkeys(("instruction", "input", "output", "history"), JUNK)),
}
CHATS = {
    (template, bos): make_chat(make_job(tiny_tokenizer(template=template, bos=bos)).settings)
    for template in (CHATML, None)
    for bos in (False, True)
}


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from([*ANY_ROWS]).flatmap(lambda name: st.tuples(st.just(name), st.lists(ANY_ROWS[name], max_size=4))),
    st.sampled_from([*CHATS]),
    st.sampled_from(["error", "skip", "truncate"]),
    st.integers(2, 60),
)
@example(("text", [{"text": ""}, {"text": "\ud800"}]), (CHATML, True), "error", 9)
def test_every_row_is_an_example_or_a_reason(
    rows: tuple[str, list[Any]], of: tuple[str | None, bool], policy: str, length: int
) -> None:
    name, values = rows
    chat = CHATS[of]
    job = Job(chat.settings, Limits(length, on_long_row=policy))
    task = Task(values, [f"a:{number}" for number in range(1, len(values) + 1)], name, False)
    result = prepare(task, job, chat)
    json.dumps([result.bad, result.tally, result.long, result.lost])
    bad = {index for index, *_ in result.bad}
    kept = {index for index, *_ in result.examples}
    assert len(bad) == len(result.bad)
    assert not bad & kept
    left_out = result.tally["num_skipped"] + result.tally["num_emptied"] + result.tally["num_too_long"]
    assert len(bad | kept) >= len(values) - left_out
    assert sum(tokens for _, tokens, *_ in result.examples) == len(result.ids)
    assert all(0 < trained <= tokens <= length for _, tokens, trained, *_ in result.examples)
    for index, where, what, todo in result.bad:
        assert where.startswith(f"a:{index + 1}")
        assert 0 < len(what) < MOST_WORDS + 50
        assert len(todo) < 400


def test_a_row_that_is_rendered_to_nothing_is_refused() -> None:
    """It would count as one token less than none in the loss."""
    chat = tiny_chat("{% for m in messages %}{{ m.content }}{% endfor %}", train_on="all")
    rows = [{"question": "", "answer": ""}, {"question": "a", "answer": "b"}]
    result = prepared(rows, replace(JOB, settings=chat.settings), chat)
    assert [(index, what.partition(":")[0]) for index, _, what, _ in result.bad] == [(0, "nothing to train")]
    assert [index for index, *_ in result.examples] == [1]
    assert Example([], [], "a").num_trained == 0
