"""The preparing processes: hostile templates and rows end as messages, in bounded time and memory; no process stays."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from preparing import SHORT, answers, children, load, make_job, make_task, numbered, refusal, refused, write_rows
from tiny_tokenizer import CHATML, tiny_tokenizer

from qlora_cli.data import pool as pool_module
from qlora_cli.data import prepare
from qlora_cli.data.pool import PACKAGE, Pool
from qlora_cli.data.worker import Job
from qlora_cli.errors import Exit, UserError

MEMORY = 2**28
BRIEF = {"row_seconds": 0.25, "chunk_seconds": 2, "load_seconds": 1, "memory_bytes": MEMORY}
"""Processor time and memory in these tests."""


@pytest.fixture(autouse=True)
def _no_process_stays() -> Iterator[None]:
    before, threads = children(), threading.active_count()
    yield
    assert children() <= before
    assert threading.active_count() <= threads


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """load_examples gives its processes little time."""
    monkeypatch.setattr(prepare, "Job", lambda settings, limits: Job(settings, limits, **BRIEF))


# ── hostile templates ────────────────────────────────────────────────────────────────────────────────────────────────

SAFE, SLOW, LARGE = "is unsafe", "s of processor time", f"needed more than {MEMORY // 2**20:,} MiB of memory"
BIG = (LARGE, SLOW)  # whichever comes first
RANGE, DEEP = "Range too big", "recursion"
ATTACKS = {
    # Python's internals
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": SAFE,
    "{{ cycler.__init__.__globals__.os.system('true') }}": SAFE,
    "{{ ''|attr('__class__') }}{{ (''|attr('__class__')).mro() }}": SAFE,
    "{{ '{0.__class__.__mro__}'.format('')|length }}{{ lipsum.__globals__['os'] }}": SAFE,
    "{% set x = namespace(a=1) %}{{ x.__init__.__globals__ }}": "has no attribute",
    "{{ dict.__class__.__base__ }}": SAFE,
    "{{ raise_exception.__globals__.x }}": SAFE,
    "{% set x = [] %}{{ x.append(1) }}": SAFE,  # ImmutableSandboxedEnvironment
    "{% include '/etc/passwd' %}": "no loader",
    "{% import 'os' as os %}": "no loader",
    # time
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": SLOW,
    "{% for a in range(99999) %}{% for b in range(99999) %}{% continue %}{% endfor %}{% endfor %}": SLOW,
    "{{ 10**(10**8) }}": SLOW,  # folded while the template compiles
    "{% set n = 10 %}{{ n**(n**8) }}": SLOW,
    "{% set ns = namespace(n=3) %}{% for i in range(99999) %}{% set ns.n = ns.n * ns.n %}{% endfor %}": SLOW,
    "{{ (range(99999)|list * 50)|sort(reverse=true)|map('string')|sort|join|length }}" * 9: BIG,
    "{{ lipsum(n=99999, min=99999, max=999999) }}": BIG,
    # memory
    "{{ 'a' * 10**9 }}": BIG,  # folded while the template compiles
    "{% set n = 10 %}{{ 'a' * n**9 }}": BIG,
    "{% set ns = namespace(s='aa') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}": BIG,
    "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}": BIG,
    "{% set n = 10 %}{{ 'a'.center(n**10) }}": BIG,
    "{{ 'a'|center(10**10) }}": BIG,
    "{{ '%1000000000d' % 1 }}{{ '%1000000000d' % 2 }}": BIG,
    "{{ '{:>1000000000}{:>1000000000}'.format(1, 2) }}": BIG,
    "{% set n = 10**5 %}{{ ('a\n' * n)|indent(n) }}": BIG,
    "{{ range(99999)|list|tojson(indent=99999) }}": BIG,
    "{{ range(99999)|join('a' * 10**5) }}": BIG,
    "{{ ('a' * 10**5)|replace('a', 'a' * 10**5) }}": BIG,
    "{{ ('a' * 10**5).replace('a', 'a' * 10**5) }}": BIG,
    "{% for a in range(99999) %}{{ 'a' * 10**5 }}{% endfor %}": BIG,
    "{{ range(10**9)|list }}": RANGE,
    # the stack
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": DEEP,
    "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}": DEEP,
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}": (DEEP, "too many", "nested"),
    # text that no tokenizer takes
    '{{ "\\ud800" }}': "half of a character",
    "{{ 'a ' * 20000000 }}": ("characters, more than", *BIG),
    # messages
    "{{ raise_exception('a' * 10**7) }}": "stops with: aaaa",
    "{{ messages['a' * 10**7].b }}": "",
}


PEAKS: list[int] = []
"""Resident memory of the children that a test has seen, in KiB."""


@pytest.fixture(autouse=True)
def _watched_children() -> Iterator[None]:
    """Samples the children's memory: the kernel's own maximum is over all children that other tests have had."""
    PEAKS.clear()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            for child in children():
                with suppress(OSError, IndexError):
                    if b"worker" not in Path(f"/proc/{child}/cmdline").read_bytes():
                        continue  # a fork of ours that is not yet the process that it will be
                    PEAKS.append(int(Path(f"/proc/{child}/status").read_text().split("VmHWM:")[1].split()[0]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield
    done.set()
    watcher.join()


def outcome(job: Job, template: dict[str, Any] | None = None, row: dict[str, Any] | None = None) -> str:
    """The message that one row ends with."""
    try:
        with Pool(job, 1, first_bad_ends=True) as pool:
            (result,) = pool.map([make_task([row or SHORT], template)])
    except UserError as error:
        return str(error)
    assert not result.examples
    ((_, where, what, todo),) = result.bad
    return str(UserError(where, what, todo))


def check(message: str, expected: str | tuple[str, ...], began: float, before: int) -> None:
    """The message says what is expected, and nothing took long or much."""
    assert any(part in message for part in ((expected,) if isinstance(expected, str) else expected)), message[:500]
    assert len(message) < 1500
    assert time.monotonic() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10  # KiB
    assert PEAKS, "no preparing process was seen"
    assert max(PEAKS) < (MEMORY + 512 * 2**20) // 2**10


@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
def test_a_hostile_chat_template_ends_as_a_message(attack: str) -> None:
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    job = make_job(tiny_tokenizer(template=attack + CHATML), **BRIEF)
    check(outcome(job), ATTACKS[attack], began, before)


OF_ROWS = [*ATTACKS][:4] + [*ATTACKS][10:20:2] + [*ATTACKS][28:34]


@pytest.mark.parametrize("attack", OF_ROWS, ids=range(len(OF_ROWS)))
def test_a_hostile_template_of_a_source_ends_as_a_message(attack: str) -> None:
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    template = {"prompt": "{{ question }}" + attack, "completion": "{{ answer }}", "chat": False}
    check(outcome(make_job(**BRIEF), template), ATTACKS[attack], began, before)


@pytest.mark.parametrize("value", ["{{ 'a' * 10**9 }}", "a" * 10**7, [[["{% for x in range(9**9) %}"]]], 10**4000])
def test_kwargs_of_the_template_are_values_and_never_run(value: Any) -> None:
    job = make_job(tiny_tokenizer(template="{% if given %}" + CHATML + "{% endif %}"), kwargs={"given": value}, **BRIEF)
    with Pool(job, 1) as pool:
        (result,) = pool.map([make_task([SHORT])])
    assert (len(result.examples), result.bad) == (1, [])


def test_what_hangs_in_every_row_is_told_in_the_time_of_a_few_rows(tmp_path: Path, brief: None) -> None:
    path = write_rows(tmp_path / "a.jsonl", map(numbered, range(1000)))
    slow = tiny_tokenizer(template="{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    began = time.monotonic()
    reason = "preparing the row took more than 0.25 s of processor time (or 2 s to tokenise)"
    assert refusal(path, tokenizer=slow) == f"{path}:1: {reason}. Mend or remove the row, or the chat template."
    message = refusal(path, tokenizer=slow, on_bad_row="skip")
    assert message == (
        f"{path}:3: {reason}, as did 2 rows before it, so none is tried any more. Mend the template, or the rows."
    )
    assert time.monotonic() - began < 20


# ── hostile rows ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("character", ["a", "a ", "é", "🤗"])
def test_a_giant_row_ends_as_a_message(character: str) -> None:
    message = outcome(make_job(), row={"question": "q", "answer": character * (2 * 10**8 // len(character.encode()))})
    assert message.startswith("a:1: ")
    assert "1,024 MiB of memory" in message or "characters, more than 10,000,000" in message
    assert len(message) < 1500


def test_a_message_that_quotes_a_giant_value_is_short(tmp_path: Path) -> None:
    rows: list[Any] = [{"messages": [{"role": "a" * 10**7, "content": "x"}]}, {"b" * 10**7: 1}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    message = refusal(path, on_bad_row="skip")
    assert message.startswith(f"data.train: all 2 rows are bad; the first: {path}:1: message 1: has the unknown role")
    assert "(10,000,0" in message
    assert len(message) < 2000


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DIE = "{% if messages[0].content == 'die' %}" + LOOPS + "{% endif %}"


@pytest.mark.parametrize("workers", [1, 3])
def test_rows_that_kill_their_process_are_skipped_and_the_others_keep_their_order(
    tmp_path: Path, brief: None, workers: int
) -> None:
    rows = [numbered(number) for number in range(600)]
    rows[5]["question"] = rows[400]["question"] = "die"
    path = write_rows(tmp_path / "a.jsonl", rows)
    tokenizer = tiny_tokenizer(template=DIE + CHATML)
    examples = load(path, tokenizer=tokenizer, on_bad_row="skip", workers=workers)
    assert answers(examples) == [row["answer"] for row in rows if row["question"] != "die"]
    assert [where for where, _, _ in examples.bad] == [f"{path}:6", f"{path}:401"]
    assert all("took more than 0.25 s of processor time" in what for _, what, _ in examples.bad)
    wheres = [example.where for example in examples.rows]
    assert wheres == [f"{path}:{number}" for number in range(1, 601) if number not in (6, 401)]


def test_the_first_bad_row_is_told_even_before_one_that_kills(tmp_path: Path, brief: None) -> None:
    rows: list[Any] = [numbered(number) for number in range(600)]
    rows[5]["question"], rows[3] = "die", {"question": "a", "answer": 7}
    path = write_rows(tmp_path / "a.jsonl", rows)
    tokenizer = tiny_tokenizer(template=DIE + CHATML)
    assert refusal(path, tokenizer=tokenizer).startswith(f"{path}:4: answer is the number 7")
    rows[3] = numbered(3)
    path = write_rows(tmp_path / "a.jsonl", rows)
    assert refusal(path, tokenizer=tokenizer).startswith(f"{path}:6: preparing the row took more than 0.25 s")


# ── processes end ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_process_that_is_killed_once_costs_nothing_but_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [make_task([numbered(number) for number in range(at, at + 5)]) for at in (0, 5)]
    with Pool(make_job(), 1) as pool:
        expected = list(pool.map(tasks))
        (process,) = pool.processes
        os.kill(process.child.pid, signal.SIGKILL)
        assert list(pool.map(tasks)) == expected
        assert len(pool.processes) == 2


def test_a_process_that_is_always_killed_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    tell = pool_module._Process._tell

    def killed(self: Any, thing: Any) -> None:
        if not isinstance(thing, Job):
            os.kill(self.child.pid, number)
            self.child.wait()
        tell(self, thing)

    monkeypatch.setattr(pool_module._Process, "_tell", killed)
    for number, reason in (  # noqa: B007 (read by `killed`)
        (signal.SIGKILL, "was killed from outside: mostly the system does so when memory runs out"),
        (signal.SIGTERM, r"ended its process \(exit status -15\)"),
    ):  # by no doing of the row, which must not be left out as a bad one
        with Pool(make_job(), 1) as pool, pytest.raises(UserError, match=f"a:1: .* the row {reason}") as caught:
            list(pool.map([make_task([SHORT])]))
        assert caught.value.code == Exit.FAILED
    number = signal.SIGSEGV
    with Pool(make_job(), 1) as pool:
        (result,) = pool.map([make_task([SHORT])])
    reason = "preparing the row needed more than 1,024 MiB of memory"
    assert result.bad == [(0, "a:1", reason, "mend or remove the row, or the chat template")]


def test_three_rows_that_end_their_process_end_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    dying = tiny_tokenizer(template=DIE + CHATML)
    rows = [{"question": "die", "answer": "a"}, numbered(1)]
    with Pool(make_job(dying, **BRIEF), 1) as pool:
        results = pool.map([make_task(rows)] * 3)
        for _ in range(2):
            result = next(results)
            assert ([index for index, *_ in result.bad], [index for index, *_ in result.examples]) == ([0], [1])
        with pytest.raises(UserError, match="as did 2 rows before it, so none is tried any more"):
            next(results)


def test_a_process_that_cannot_start_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "a.jsonl", [SHORT])
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(tmp_path / "no python"))
        error = refused(path)
    assert str(error).startswith("data.workers: no preparing process can be started: No such file or directory.")
    assert error.code == Exit.FAILED
    monkeypatch.setattr(pool_module, "COMMAND", "raise SystemExit(7)")
    assert "preparing the tokenizer and the chat template ended its process (exit status 7)" in refusal(path)


def test_a_bug_of_ours_is_a_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bug = "import qlora_cli.data.worker as w; w.encode = lambda *_: 1 / 0; w.main()"
    monkeypatch.setattr(pool_module, "COMMAND", pool_module.COMMAND.split("from")[0] + bug)
    with pytest.raises(RuntimeError, match=r"(?s)a preparing process failed:.*ZeroDivisionError"):
        load(write_rows(tmp_path / "a.jsonl", [SHORT]))


def test_an_error_while_rows_are_read_ends_the_processes(tmp_path: Path) -> None:
    def stop(num_rows: int) -> None:
        assert children()
        raise KeyboardInterrupt

    path = write_rows(tmp_path / "a.jsonl", map(numbered, range(3000)))
    with pytest.raises(KeyboardInterrupt):
        load(path, workers=2, progress=stop)


def test_processes_that_hang_while_they_load_end_with_the_pool() -> None:
    job = make_job(tiny_tokenizer(template="{{ 10**(10**8) }}"), load_seconds=60)
    began = time.monotonic()
    with Pool(job, 2) as pool:
        futures = [pool.threads.submit(pool._run, make_task([SHORT])) for _ in range(2)]
        while len(pool.processes) < 2:
            time.sleep(0.01)
    assert time.monotonic() - began < 10
    assert all(future.exception() for future in futures)


def test_no_process_is_started_once_the_pool_is_closed() -> None:
    """A task whose process is ended by the pool's end must not be tried again row by row."""
    rows = [{"question": "die", "answer": "a"}] * 50
    with Pool(make_job(tiny_tokenizer(template=DIE + CHATML)), 1) as pool:
        future = pool.threads.submit(pool._run, make_task(rows))
        while not pool.processes or not pool.processes[0].allowed.endswith("tokenise)"):
            time.sleep(0.01)
        time.sleep(0.1)
    assert len(pool.processes) == 1
    assert future.exception() is not None


PARENT = """
import pickle, sys; sys.path.insert(0, {package!r})
from qlora_cli.data.pool import Pool
with open("job", "rb") as file:
    job, task = pickle.load(file)
with Pool(job, 2) as pool:
    for _ in pool.map(task for _ in range(10**9)):
        print("ready", flush=True)
"""
SLOWLY = "{% for a in range(9) %}{% for b in range(9999) %}{% endfor %}{% endfor %}" + CHATML


def started(template: str, folder: Path) -> subprocess.Popen[str]:
    """A process that prepares rows for ever, busy at it."""
    job = make_job(tiny_tokenizer(template=template), row_seconds=3)
    (folder / "job").write_bytes(pickle.dumps((job, make_task([SHORT] * 20))))
    command = [sys.executable, "-c", PARENT.format(package=str(PACKAGE))]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n", parent.stderr and parent.stderr.read()
    return parent


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("template", [CHATML, SLOWLY], ids=["quick", "slow"])
def test_no_process_outlives_its_parent(template: str, number: int, tmp_path: Path) -> None:
    parent = started(template, tmp_path)
    mine = children(parent.pid)
    assert len(mine) == 2
    parent.send_signal(number)
    parent.communicate()
    until = time.monotonic() + 10
    while any(map(is_alive, mine)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(map(is_alive, mine))


def test_ctrl_c_goes_to_the_parent_alone(tmp_path: Path) -> None:
    """A run that ends its step first, on Ctrl-C, still has its processes."""
    parent = started(CHATML, tmp_path)
    assert all(os.getpgid(pid) != os.getpgid(parent.pid) for pid in children(parent.pid))
    parent.kill()
    parent.communicate()


def test_files_of_the_current_folder_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json", "random", "jinja2", "tokenizers", "qlora_cli", "pickle", "struct", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w'); raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    assert len(load(write_rows(tmp_path / "a.jsonl", [SHORT])).rows) == 1
    assert not (tmp_path / "ran").exists()


def test_files_beside_the_package_stand_for_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "qlora_cli").symlink_to(PACKAGE / "qlora_cli")
    (tmp_path / "json.py").write_text("raise SystemExit(9)")
    monkeypatch.setattr(pool_module, "COMMAND", pool_module.COMMAND.replace(str(PACKAGE), str(tmp_path)))
    assert len(load(write_rows(tmp_path / "a.jsonl", [SHORT])).rows) == 1


def test_few_tasks_are_taken_ahead() -> None:
    taken = []

    def tasks() -> Iterator[Any]:
        for number in range(50):
            taken.append(number)
            yield make_task([numbered(number)])

    with Pool(make_job(), 2) as pool:
        for given, _ in enumerate(pool.map(tasks())):
            assert len(taken) <= given + 5
    assert len(taken) == 50


def test_a_task_without_rows_starts_no_process() -> None:
    with Pool(make_job(), 1) as pool:
        (result,) = pool.map([make_task([])])
        assert (result.examples, result.bad, pool.processes) == ([], [], [])
