"""The key of prepared rows, and the folder that they are kept in."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from preparing import LONG, SHORT, load, numbered, refused, write_rows
from tiny_tokenizer import CHATML, tiny_tokenizer

from qlora_cli.data import cache as cache_module
from qlora_cli.data import prepare
from qlora_cli.data.cache import NOT_PREPARING, cache_folder, code_version, locked
from qlora_cli.data.examples import Examples
from qlora_cli.errors import Exit, UserError

ROWS = [SHORT, LONG, *map(numbered, range(20))]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "rows").mkdir()
    return write_rows(tmp_path / "rows/a.jsonl", ROWS)


def no_pool(*_: Any, **__: Any) -> None:
    raise AssertionError("a process is started")


def facts(examples: Examples) -> tuple[Any, ...]:
    """Everything that is told of the examples but the folder that they lie in."""
    rows = tuple(map(str, examples.rows))
    return (rows, examples.digest, examples.num_rows, *examples.summary())


def test_another_weight_prepares_nothing_again_and_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(path)
    monkeypatch.setattr(prepare, "Pool", no_pool)
    again = load(path, source={"weight": 2})
    assert again.folder == first.folder
    assert [source.weight for source in (*first.sources, *again.sources)] == [1, 2]


def test_what_is_prepared_is_found_again_without_a_process(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(path)
    monkeypatch.setattr(prepare, "Pool", no_pool)
    again = load(path)
    assert facts(again) == facts(first)
    assert again.folder == first.folder


Change = Callable[[Path], dict[str, Any]]
"""Changes something about the file, or gives other options."""


def _options(**options: Any) -> Change:
    return lambda path: options


def _write(rows: list[Any]) -> Change:
    return lambda path: write_rows(path, rows) and {}


def _template(text: str) -> Change:
    return lambda path: {"tokenizer": tiny_tokenizer(template=text)}


def _named(path: Path) -> dict[str, Any]:
    """The tokenizer's own template in a file: messages name it."""
    (path.parent / "t.jinja").write_text(CHATML)
    return {"chat_template": str(path.parent / "t.jinja")}


def _ignored(path: Path) -> dict[str, Any]:
    (path.parent / "README.md").write_text("a")
    return {}


def _beside(path: Path) -> dict[str, Any]:
    write_rows(path.with_name("b.jsonl"), [SHORT])
    return {}


def _renamed(path: Path) -> dict[str, Any]:
    path.rename(path.with_name("z.jsonl"))
    return {}


ROW_TEMPLATE = {"prompt": "{{ question }}", "completion": "{{ answer }}"}
CHANGES: dict[str, Change] = {
    "a byte of the data": _write([{**SHORT, "answer": "43"}, *ROWS[1:]]),
    "a row more": _write([*ROWS, SHORT]),
    "another order": _write(ROWS[::-1]),
    "a file more": _beside,
    "a file that is ignored": _ignored,
    "the file's name": _renamed,
    "tokenizer": _options(tokenizer=tiny_tokenizer("trimmed")),
    "BOS": _options(tokenizer=tiny_tokenizer(bos=True)),
    "EOS": _options(tokenizer=tiny_tokenizer(eos="<s>")),
    "template": _template("a" + CHATML),
    "no template": _options(tokenizer=tiny_tokenizer(template=None)),
    "the template's file": _named,
    "kwargs": _options(chat_template_kwargs={"enable_thinking": False}),
    "kwargs that are no JSON": _options(chat_template_kwargs={"date": date(2026, 1, 2), "n": {1: 2, "1": 2}}),
    "train_on": _options(train_on="last"),
    "max_length": _options(max_length=2047),
    "two limits": _options(source_max_length=2048, target_max_length=2048),
    "on_long_row": _options(on_long_row="skip"),
    "on_bad_row": _options(on_bad_row="skip"),
    "format": _options(source={"format": "question_answer"}),
    "limit": _options(source={"limit": 3}),
    "a source's template": _options(source={"template": ROW_TEMPLATE}),
    "a source's template, as chat": _options(source={"template": {**ROW_TEMPLATE, "chat": True}}),
    "eval_fraction": _options(eval_fraction=0.5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_everything_that_rows_depend_on_changes_the_key(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(path.parent)
    options = CHANGES[name](path)
    second = load(path.parent, **options)
    assert second.folder != first.folder
    monkeypatch.setattr(prepare, "Pool", no_pool)
    assert load(path.parent, **options).folder == second.folder  # and is found again itself


def test_held_out_rows_have_a_key_of_their_own_for_every_fraction_and_seed(path: Path) -> None:
    variants = [("train", 0.5, 1), ("eval", 0.5, 1), ("train", 0.4, 1), ("train", 0.5, 2)]
    assert len({load(path, role=role, eval_fraction=part, seed=seed).folder for role, part, seed in variants}) == 4


def test_the_code_and_its_libraries_are_in_the_key(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(path).folder
    code, *libraries = code_version()
    assert len(code) == 64
    for changed in (("0", *libraries), (code, "0", *libraries[1:])):
        monkeypatch.setattr(cache_module, "code_version", lambda changed=changed: changed)
        assert load(path).folder != first


def test_no_prepared_row_depends_on_the_code_that_is_not_in_the_key() -> None:
    room = Path(cache_module.__file__).parent
    assert {name for name in NOT_PREPARING if (room / name).exists()} == NOT_PREPARING
    code = "import sys, qlora_cli.data.worker, qlora_cli.data.readers; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=room.parents[1], capture_output=True, text=True, check=True
    )
    assert not {f"qlora_cli.data.{name.removesuffix('.py')}" for name in NOT_PREPARING} & {*loaded.stdout.split()}


def test_the_same_file_under_another_path_has_other_places(path: Path, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "b.jsonl", ROWS)
    first, second = load(path), load(other)
    assert first.digest == second.digest
    assert (first.rows[0].where, second.rows[0].where) == (f"{path}:1", f"{other}:1")
    assert str(load(f"{path.parent}/*.jsonl").sources[0]).startswith(f"{path.parent}/*.jsonl: ")


def test_what_rows_do_not_depend_on_is_not_in_the_key(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = load(path).folder
    os.utime(path, (1, 1))
    monkeypatch.setattr(prepare, "Pool", no_pool)
    assert load(path, seed=2).folder == folder  # no eval_fraction
    assert load(path, today=date(2027, 1, 1)).folder == folder  # no strftime_now
    assert load(path, workers=3).folder == folder
    assert load([{"path": "x"}], role="eval", eval=[{"path": str(path)}]).folder == folder


def test_a_template_that_prints_the_date_has_a_key_for_each_day(path: Path) -> None:
    tokenizer = tiny_tokenizer(template="{{ strftime_now('%Y') }}" + CHATML)
    days = [date(2026, 1, 2), date(2026, 1, 2), date(2026, 1, 3)]
    first, again, other = (load(path, tokenizer=tokenizer, today=day).folder for day in days)
    assert first == again != other


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_cache_lies_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("QLORA_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "home/mine/prepared"
    monkeypatch.delenv("QLORA_CACHE")
    assert cache_folder() == tmp_path / "xdg/qlora/prepared"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home/.cache/qlora/prepared"


def test_a_cache_that_cannot_be_made_is_refused(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "file"))
    error = refused(path)
    assert str(error) == (
        f"{tmp_path}/file: prepared rows cannot be kept here: Not a directory. "
        "Set QLORA_CACHE to a folder that you can write."
    )
    assert error.code == Exit.ENVIRONMENT


def test_without_a_home_the_cache_is_a_temporary_folder_of_our_own(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.delenv("QLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    own = tmp_path / "tmp" / f"qlora-{os.getuid()}"
    assert load(path).folder.parent == own / "prepared"
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(os, "access", lambda *_: False)  # there, but not ours to write
    assert cache_folder() == own / "prepared"


def test_a_temporary_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("QLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    with pytest.raises(UserError, match=f"qlora-{mine + 1}: belongs to another user. Set QLORA_CACHE to a folder of"):
        cache_folder()


def test_a_cache_that_can_only_be_read_gives_what_it_has(
    path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(path)
    (cache / f"{first.folder.name}.lock").unlink()
    (cache / f"{first.folder.name}.lock").mkdir()  # what cannot be opened, even by root
    assert facts(load(path)) == facts(first)
    (first.folder / "index.json").unlink()
    error = refused(path)
    assert str(error).startswith(f"{cache}: prepared rows cannot be kept here: Is a directory. Set QLORA_CACHE to")
    assert error.code == Exit.ENVIRONMENT


def test_a_lock_that_the_disk_does_not_know_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(cache_module.fcntl, "flock", unknown)
    with (
        pytest.raises(UserError, match=f"{tmp_path}: prepared rows cannot be kept here: No locks available"),
        locked(tmp_path / "a"),
    ):
        pass
