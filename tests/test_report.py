"""The page of a preview: one file that loads nothing, runs nothing that data says, and shows the JSON's numbers."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.display import QuietReport
from qlora_cli.errors import Exit, UserError
from qlora_cli.plan.preview import preview
from qlora_cli.report import MARK, preview_page, refuse_foreign, write_page
from tests.conftest import conversation

VOID = {"meta", "br"}
HOSTILE = [
    conversation("<script>alert(1)</script>", "</pre></body> \"quoted\" 'too' & http://example.org 😀"),
    conversation("<img src=x onerror=alert(1)>", "\x1b[31m\x00 \u202e <|im_end|"),
]


class Page(HTMLParser):
    """What a browser would make of it: elements, attributes, text; fails where an element is not closed."""

    def __init__(self, page: str):
        super().__init__()
        self.stack: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[str] = []
        self.trained = self.text = ""
        self.cells: list[str] = []
        self.feed(page)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "pre":
            self.rows.append("")
        if tag == "td":
            self.cells.append("")
        self.is_trained = tag == "span" and "t" in (dict(attrs).get("class") or "").split()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag
        self.is_trained = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if "pre" in self.stack:
            self.rows[-1] += data
            self.trained += data if self.is_trained else ""
        if "td" in self.stack:
            self.cells[-1] += data


@pytest.fixture
def result(make_recipe, tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "<b>rows & more.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in HOSTILE))
    recipe = make_recipe(data={"train": [{"path": str(path), "weight": 2.0}], "max_length": 256})
    return preview(recipe, QuietReport(), "train", None, 20)


def test_the_page_loads_nothing_and_runs_nothing(result):
    page = preview_page(result)
    parsed = Page(page)
    assert {tag for tag, _ in parsed.seen}.isdisjoint({"script", "img", "link", "iframe", "object", "a", "form", "b"})
    for _, attributes in parsed.seen:
        assert not [name for name in attributes if name in ("src", "href") or name.startswith("on")]
    outside = page.replace("http://example.org", "")
    assert not re.search(r"https?://|url\(|@import", outside)
    policy = next(attributes["content"] for tag, attributes in parsed.seen if "http-equiv" in attributes)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_rows_are_shown_letter_by_letter_and_trained_ones_marked(result):
    parsed = Page(preview_page(result))
    assert parsed.rows[0].lstrip("\n") == (
        "<|im_start|>user\n<script>alert(1)</script><|im_end|>\n<|im_start|>assistant\n"
        "</pre></body> \"quoted\" 'too' & http://example.org 😀<|im_end|>\n"
    )
    assert "\\x1b[31m\\x00 \\u202e <|im_end|<|im_end|>" in parsed.rows[1]
    assert parsed.trained.startswith("</pre></body> \"quoted\" 'too' & http://example.org 😀<|im_end|>")
    assert "user" not in parsed.trained
    assert ("span", {"class": "t s", "title": "token 2"}) in parsed.seen
    assert "<b>rows & more.jsonl:1" in parsed.text


def test_the_figures_are_those_of_the_json(result):
    parsed = Page(preview_page(result))
    statistics = result["statistics"]
    names = ("num_rows", "num_examples", "num_tokens")
    assert [f"{result['sources'][0][name]:,}" for name in names] == parsed.cells[1:4]
    spread = [f"{statistics['lengths'][name]:,}" for name in ("least", "median", "p90", "p99", "most")]
    assert parsed.cells[6:11] == spread
    assert parsed.cells[11] == f"{statistics['lengths']['mean']:,.1f}"
    for label, text in result["summary"]:
        assert label + text in parsed.text
    widths = [attributes["style"] for _, attributes in parsed.seen if "bar" in (attributes.get("class") or "").split()]
    most = max(one["num_examples"] for one in statistics["histogram"])
    assert widths == [f"width: {100 * one['num_examples'] / most:.2f}%" for one in statistics["histogram"]]


def test_a_page_is_written_and_written_again(result, tmp_path):
    path = tmp_path / "page.html"
    write_page(path, result)
    first = path.read_text(encoding="utf-8")
    assert MARK in first[:200]
    write_page(path, {**result, "notes": ["another note"]})
    assert "another note" in path.read_text(encoding="utf-8")
    assert not list(tmp_path.glob(".*"))


def test_what_a_user_made_is_never_overwritten(result, tmp_path):
    path = tmp_path / "mine.html"
    for content in ("<!doctype html>my own page", "", "x" * 300 + MARK):
        path.write_text(content)
        with pytest.raises(UserError) as error:
            write_page(path, result)
        assert str(error.value) == f"{path}: is there already, and no page of ours. Name another file."
        assert error.value.code == Exit.REFUSED
        assert path.read_text() == content


def test_a_folder_and_a_missing_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"is a folder\. Name a file in a folder that exists"):
        refuse_foreign(tmp_path)
    with pytest.raises(UserError, match=r"there is no folder .*/none\. Name a file"):
        refuse_foreign(tmp_path / "none" / "page.html")


def test_the_command_writes_the_page_and_refuses_before_it_prepares(make_recipe, tmp_path, monkeypatch, capsys):
    import sys

    from qlora_cli import cli
    from qlora_cli.recipe import dump_recipe

    (tmp_path / "my.yaml").write_text(dump_recipe(make_recipe()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["qlora", "preview", "my.yaml", "--html", "page.html"])
    _ended(cli.main, 0)
    assert capsys.readouterr().out == "page.html\n"
    assert len(Page((tmp_path / "page.html").read_text()).rows) == 12
    monkeypatch.setattr(sys, "argv", ["qlora", "preview", "my.yaml", "--html", "my.yaml"])
    monkeypatch.setattr("qlora_cli.commands.preview", None)
    _ended(cli.main, 3)
    assert capsys.readouterr().err == "my.yaml: is there already, and no page of ours. Name another file.\n"


def _ended(main, code: int) -> None:
    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code or 0) == code
