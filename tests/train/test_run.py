"""The run folder belongs to one run and one process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from qlora_cli.errors import Exit, UserError
from qlora_cli.train.run import (
    MAY_CHANGE,
    Run,
    append_metrics,
    check_resume,
    claim,
    date_of,
    differences,
    locked,
    metrics_until,
    read_facts,
)


def test_a_second_process_is_refused_while_the_first_one_lives(tmp_path):
    script = (
        "import sys; from pathlib import Path; from qlora_cli.train.run import locked\n"
        "with locked(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="another qlora process works in it") as error, locked(tmp_path):
            pass
        assert error.value.code == Exit.IN_USE
        process.kill()
        process.wait()
    with locked(tmp_path) as run:  # a killed process leaves no lock behind
        assert run.folder == tmp_path


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with (
        pytest.raises(UserError, match=r"output_dir: .*cannot be written: Not a directory") as error,
        locked(file / "run"),
    ):
        pass
    assert error.value.code == Exit.FAILED


def test_a_folder_with_other_files_is_refused(tmp_path, make_recipe):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"no run folder and not empty \(thesis\.tex\)"):
        claim(Run(tmp_path), make_recipe(), b"")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_changes_no_bit_may_change_when_a_run_is_continued(tmp_path, make_recipe):
    """Among it what the message of a run that is out of memory says to set."""
    claim(Run(tmp_path), make_recipe(training={"save_steps": 2}), b"first")
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    claim(Run(tmp_path), make_recipe(training={"save_steps": 3, "gradient_checkpointing": True}), b"second")


def test_another_run_in_the_folder_is_refused_naming_the_keys(tmp_path, make_recipe):
    claim(Run(tmp_path), make_recipe(), b"first")
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"holds another run: adapter\.r is 4 there, 8 here; training\.seed is 7 there, 9"
    ):
        claim(Run(tmp_path), make_recipe(adapter={"r": 8}, training={"seed": 9}), b"second")
    assert (tmp_path / "recipe.yaml").read_bytes() == b"first"


def test_a_first_attempt_that_trained_nothing_does_not_lock_the_folder(tmp_path, make_recipe):
    claim(Run(tmp_path), make_recipe(), b"with a mistake")
    claim(Run(tmp_path), make_recipe(data={"max_length": 99}), b"mended")
    assert (tmp_path / "recipe.yaml").read_bytes() == b"mended"


def test_the_same_run_is_welcome_and_may_change_how_it_is_watched(tmp_path, make_recipe):
    claim(Run(tmp_path), make_recipe(), b"first")
    claim(Run(tmp_path), make_recipe(training={"logging_steps": 3, "save_steps": 5}, output_dir="elsewhere"), b"again")
    assert (tmp_path / "recipe.yaml").read_bytes() == b"again"


def test_keys_that_may_change_exist(make_recipe):
    values = make_recipe().model_dump(by_alias=True)
    for key in MAY_CHANGE:
        place = values
        for part in key.split("."):
            assert part in place, key
            place = place[part]


def test_differences_are_nested_keys():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ["a.c is 2 there, 3 here"]


def test_resume_never_refuses_progress(tmp_path):
    check_resume(Run(tmp_path), "never")
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    check_resume(Run(tmp_path), "auto")
    with pytest.raises(UserError, match="which --resume never would lose"):
        check_resume(Run(tmp_path), "never")


def test_metrics_after_the_resumed_step_are_measured_again(tmp_path):
    run = Run(tmp_path)
    metrics_until(run, 0)  # a run without metrics
    for step in (1, 2, 3):
        append_metrics(run, {"step": step})
    with run.metrics.open("a") as file:
        file.write('{"step": 4, "lo')  # torn by a crash
    metrics_until(run, 2)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2]


def test_another_data_source_is_told_by_the_key_that_differs():
    before = {"data": {"train": [{"path": "a", "weight": 1}, {"path": "b"}]}, "training": {"deterministic": True}}
    now = {"data": {"train": [{"path": "a", "weight": 2}, {"path": "b"}]}, "training": {"deterministic": False}}
    assert differences(before, now) == [
        "data.train[0].weight is 1 there, 2 here",
        "training.deterministic is true there, false here",
    ]


@pytest.mark.parametrize("damaged", [b"{", b"\xff\xfe\x00", b"[1]", b""])
def test_a_damaged_run_folder_is_a_message(tmp_path, make_recipe, damaged):
    run = Run(tmp_path)
    assert read_facts(run) is None
    run.facts.write_bytes(damaged)
    with pytest.raises(UserError, match=r"run.json: (not JSON|expected a JSON object)"):
        read_facts(run)
    run.facts.write_text('{"date": "soon"}')
    with pytest.raises(UserError, match=r"date is 'soon', no day. Write it as YYYY-MM-DD"):
        date_of(run)
    run.resolved.write_bytes(damaged)
    with pytest.raises(UserError, match=r"resolved.yaml: damaged"):
        claim(run, make_recipe(), b"")
