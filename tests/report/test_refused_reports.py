"""What `qlora report` refuses, and what it never overwrites."""

from __future__ import annotations

import json

import pytest

from qlora_cli.report.png import MARK as PICTURE_MARK
from qlora_cli.report.run import MARK
from tests.report.conftest import step


def test_a_folder_that_is_no_run_is_refused(tmp_path, qlora):
    ended = qlora("report", tmp_path)
    assert (ended.code, ended.out) == (2, "")
    assert "no run folder (no resolved.yaml). Name the output_dir of a run." in ended.err


@pytest.mark.parametrize("text", ["[1, 2", "- a list", "\x00"])
def test_a_resolved_recipe_that_is_none_is_refused(made_run, text, qlora):
    folder = made_run()
    (folder / "resolved.yaml").write_text(text)
    ended = qlora("report", folder)
    assert ended.code == 2
    assert "resolved.yaml: no recipe" in ended.err


@pytest.mark.parametrize(("name", "kind"), [("report.html", "page"), ("loss.png", "picture")])
def test_what_a_user_made_is_never_overwritten(made_run, qlora, name, kind):
    folder = made_run([step(1)])
    for content in (b"mine", b"x" * 300 + MARK.encode() + PICTURE_MARK):
        (folder / name).write_bytes(content)
        ended = qlora("report", folder)
        assert ended.code == 3
        assert f"{name}: is there already, and no {kind} of ours. Name another file." in ended.err
        assert (folder / name).read_bytes() == content
        assert not ({"report.html", "loss.png"} - {name}) & {path.name for path in folder.iterdir()}, "half was written"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--png", "a.svg"], "is the picture, a PNG. End its name in .png."),
        (["--png", "a.png", "--out", "a.png"], "is named for the page and for the picture. Name two files."),
        (["--out", "none/a.html"], "there is no folder none"),
        (["--png", "none/a.png"], "there is no folder none"),
    ],
)
def test_places_that_cannot_be_are_refused_before_anything_is_written(made_run, monkeypatch, qlora, arguments, message):
    folder = made_run([step(1)])
    monkeypatch.chdir(folder)
    ended = qlora("report", folder, *arguments)
    assert ended.code == 2
    assert message in ended.err
    assert {path.name for path in folder.iterdir()} == {"resolved.yaml", "run.json", "metrics.jsonl"}


def test_problems_are_one_json_object_too(tmp_path, qlora):
    ended = qlora("report", tmp_path, "--json")
    assert json.loads(ended.out)["problems"][0]["todo"] == "name the output_dir of a run"
