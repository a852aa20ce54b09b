"""A checkpoint is whole or not there, and a damaged one is never used in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_cli.errors import Exit, UserError
from qlora_cli.model.whole_folder import MANIFEST, publish
from qlora_cli.train.checkpoint import checkpoints, newest_valid


def write_files(place: Path) -> None:
    (place / "weights.bin").write_bytes(bytes(range(256)) * 8)
    (place / "state.json").write_text('{"step": 3}')


def make(folder: Path, step: int) -> Path:
    return publish(folder / f"step-{step:06d}", write_files)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, empty, Path.unlink], ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("name", ["weights.bin", "state.json", MANIFEST])
def test_a_damaged_newest_checkpoint_is_set_aside_and_told(tmp_path, name, harm):
    good, bad = make(tmp_path, 3), make(tmp_path, 5)
    harm(bad / name)
    told: list[str] = []
    assert newest_valid(tmp_path, told.append) == good
    assert len(told) == 1
    assert name in told[0] or harm is flip_a_bit
    assert (tmp_path / "step-000005.broken").is_dir()
    assert checkpoints(tmp_path) == [good]


def test_a_second_broken_one_of_the_same_step_is_kept_too(tmp_path):
    make(tmp_path, 1)
    for _ in range(2):
        empty(make(tmp_path, 5) / "weights.bin")
        newest_valid(tmp_path, lambda text: None)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000001", "step-000005.broken", "step-000005.broken.2"}


def test_all_damaged_is_an_error_now_and_on_the_next_run(tmp_path):
    for step in (1, 2):
        empty(make(tmp_path, step) / "weights.bin")
    for _ in range(2):
        with pytest.raises(UserError, match="every checkpoint is damaged") as error:
            newest_valid(tmp_path, lambda text: None)
        assert error.value.code == Exit.FAILED


def test_no_checkpoint_is_no_error(tmp_path):
    assert newest_valid(tmp_path / "none", lambda text: None) is None


def test_the_newest_is_the_highest_step_not_the_last_by_name(tmp_path):
    make(tmp_path, 999_999)
    assert newest_valid(tmp_path, print) != make(tmp_path, 1_000_000)
    assert newest_valid(tmp_path, print) == tmp_path / "step-1000000"
