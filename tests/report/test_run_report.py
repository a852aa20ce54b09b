"""`qlora report`: what it shows of a run in any state."""

from __future__ import annotations

import fcntl
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_cli.report.png import MARK as PICTURE_MARK
from qlora_cli.report.reading import read_run
from qlora_cli.report.run import run_page, write_report
from tests.report.conftest import FACTS, step
from tests.test_report import Page

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> \x1b[31m\u202eמצב 😀 http://example.org \ud800"
)
ANSWERS = [{"key": {}}, {"row": 0, "where": f"a{HOSTILE}:1", "prompt": HOSTILE, "generated": HOSTILE,
                         "references": [HOSTILE, "two"]}]  # fmt: skip


class ReportPage(Page):
    """A page with charts in it: every element is closed, and what stands in headings is kept."""

    def __init__(self, page: str):
        self.headings = ""
        super().__init__(page)

    def handle_data(self, data: str) -> None:
        super().handle_data(data)
        if {"h1", "h2", "h3", "h4"} & {*self.stack}:
            self.headings += data + "\n"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def page_of(folder: Path) -> ReportPage:
    write_report(folder)
    return ReportPage((folder / "report.html").read_text(encoding="utf-8"))


def suite(**models: float) -> dict:
    """A result of `qlora eval` with a loss for each model."""
    return {"rows": 3, "notes": [], "differences": [],
            "models": {name: {"loss": {"value": value, "low": value - 0.1, "high": value + 0.1}}
                       for name, value in models.items()}}  # fmt: skip


# ── a real run ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_writes_page_and_picture_of_a_real_run(trained_run):
    before = {path: path.stat().st_mtime_ns for path in trained_run.rglob("*") if path.is_file()}
    for _ in range(2):  # it may be written over itself
        done = subprocess.run(
            [sys.executable, "-m", "qlora_cli", "report", str(trained_run)], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"{trained_run}/report.html\n{trained_run}/loss.png\n"
    written = {trained_run / "report.html", trained_run / "loss.png"}
    assert {path: path.stat().st_mtime_ns for path in before if path not in written} == {
        path: time for path, time in before.items() if path not in written
    }, "something else of the run was touched"
    page = ReportPage((trained_run / "report.html").read_text())
    assert "finished at step 6 of 6" in page.text
    for title in ("Loss", "Learning rate", "Gradient norm, before clipping", "Speed", "Evaluations in training"):
        assert title in page.text
    assert [attributes["role"] for tag, attributes in page.seen if tag == "svg"] == 6 * ["img"]
    found = json.loads((trained_run / "eval" / "loss.json").read_text())["models"]
    before_, after = found["base"]["loss"]["value"], found["adapter"]["loss"]
    result = (
        f"Held-out loss {before_:.4g} → {after['value']:.4g} (95% interval {after['low']:.3g} to {after['high']:.3g})"
    )
    assert result in page.text
    answers = [json.loads(line) for line in (trained_run / "eval" / "generate.adapter.jsonl").read_text().splitlines()]
    first = next(line for line in answers if line.get("row") == 0)
    assert any(first["prompt"] in text for text in page.rows)


def test_a_run_stores_its_plan_and_the_report_holds_it_against_what_came(trained_run):
    plan = json.loads((trained_run / "run.json").read_text())["plan"]
    assert plan["steps"] == 6
    assert plan["memory_bytes"] > 0
    assert (plan["layers_recomputed"], plan["layers"]) == (0, 2)
    page = page_of(trained_run)
    assert page.cells[:2] == ["6", "6"], "steps planned, steps done"
    assert "On a CPU the plan counts tensors" in page.text


def test_the_picture_is_of_these_numbers_and_json_names_the_places(trained_run, tmp_path, qlora):
    ended = qlora("report", trained_run, "--out", tmp_path / "a.html", "--png", tmp_path / "a.png", "--json")
    result = json.loads(ended.out)
    assert (result["page"], result["png"]) == (str(tmp_path / "a.html"), str(tmp_path / "a.png"))
    assert (result["finished"], result["step"], result["notes"]) == (True, 6, [])
    assert PICTURE_MARK in (tmp_path / "a.png").read_bytes()[:200]


# ── any state ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_that_has_not_logged_anything_has_a_page_and_no_picture(made_run):
    folder = made_run(facts=None)
    result = write_report(folder)
    assert result["png"] is None
    assert result["notes"] == ["no picture: no step was logged yet"]
    assert not (folder / "loss.png").exists()
    page = ReportPage((folder / "report.html").read_text())
    assert "No step was logged yet" in page.text
    assert "not finished: step 0 is the last one logged" in page.text
    assert "Nothing was evaluated yet" in page.text


def test_one_logged_step_is_enough(made_run):
    page = page_of(made_run([step(1)]))
    assert "Loss in training 5 at step 1" in page.text
    assert len([tag for tag, _ in page.seen if tag == "svg"]) == 5
    assert "not finished: step 1 of 40" in page.text


def test_a_running_run_is_read_and_not_locked(made_run):
    folder = made_run([step(at) for at in (1, 2, 3)], files={"run.lock": ""})
    with (folder / "run.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert "not finished: step 3 of 40" in page_of(folder).text


def test_a_line_torn_by_a_crash_is_left_out_and_noted(made_run):
    page = page_of(made_run([step(1), step(2), '{"step": 3, "lo']))
    assert "metrics.jsonl: 1 line could not be read" in page.text
    assert "step 2 of 40 is the last one logged" in page.text


def test_numbers_that_are_none_are_left_out_of_the_curves(made_run):
    lines = [step(1), step(2, loss=math.nan), step(3, loss=math.inf, grad_norm=None), step(4, memory_bytes="much")]
    page = page_of(made_run([*lines, [1, 2], {"step": "four"}, {"no": "step"}]))
    assert "Loss in training 5 at step 1 → 1.25 at step 4" in page.text
    points = [attributes["points"] for tag, attributes in page.seen if attributes.get("class") == "main"]
    assert points
    assert not [text for text in points if text and ("nan" in text or "inf" in text)]


def test_what_is_damaged_beside_the_metrics_is_noted(made_run):
    files = {"eval/loss.json": "{", "eval/other.json": [1], "merged/merge.json": "[" * 100_000, "run.json": "no"}
    page = page_of(made_run([step(1)], facts=None, files=files))
    for name in ("eval/loss.json", "eval/other.json", "merged/merge.json", "run.json"):
        assert f"{name} could not be read" in page.text


def test_the_held_out_loss_of_training_stands_where_no_suite_has_it(made_run):
    lines = [step(1), {"step": 1, "eval_loss": 4.0, "eval_accuracy": 0.5}, step(2), {"step": 2, "eval_loss": 3.0}]
    page = page_of(made_run(lines))
    assert "Held-out loss 4 at step 1 → 3 at step 2" in page.text
    assert "50.0%" in page.cells


def test_a_run_without_a_plan_says_so(made_run):
    facts = {name: value for name, value in FACTS.items() if name != "plan"}
    assert "This run stored no plan" in page_of(made_run([step(1)], facts)).text


def test_on_a_gpu_the_planned_memory_is_a_line_in_the_curve(made_run):
    plan = {**FACTS["plan"], "memory_bytes": 1_000_000_000}
    page = page_of(made_run([step(1), step(2)], {**FACTS, "device": "NVIDIA H100", "plan": plan}))
    assert [attributes for tag, attributes in page.seen if attributes.get("class") == "limit" and tag == "polyline"]
    assert "Peak memory, of the GPU" in page.text
    assert "planned: 1 at step 0" in page.text


def test_the_time_is_that_of_the_logged_steps(made_run):
    lines = [step(at, trained_tokens_per_s=10.0) for at in (10, 20, 30)]  # 1.5 epochs of 1,000 tokens at 10 a second
    assert "2 min 30 s" in page_of(made_run(lines)).cells


# ── evaluations, merge, answers ──────────────────────────────────────────────────────────────────────────────────────


def test_suites_are_shown_with_intervals_and_over_first_rows_apart(made_run):
    files = {"eval/quiz.json": suite(base=3.0, adapter=2.0), "eval/first-2/quiz.json": suite(base=9.0)}
    page = page_of(made_run([step(1)], files=files))
    assert "Held-out loss 3 → 2 (95% interval 1.9 to 2.1), suite quiz" in page.text
    assert "3.00002.9000 to 3.1000" in page.cells
    assert page.headings.index("quiz, 3 rows") < page.headings.index("first-2/quiz, 3 rows")


@pytest.mark.parametrize(
    ("certificate", "words"),
    [
        ({"held": True, "mean_kl": 1.5e-5, "top1_agreement": 0.998}, ["The certificate holds", "1.5e-5", "99.80%"]),
        ({"held": True, "limit": None, "loss_merged": 2.5}, ["onto the original base).", "2.5"]),
        ({"held": False, "limit": {"mean_kl": 0.01}}, ["does not hold", "limit, mean KL, nats", "0.01"]),
        (None, ["without being compared"]),
    ],
)
def test_the_certificate_of_a_merge_is_shown(made_run, certificate, words):
    merge = {"dtype": "bfloat16", "base": "original", "certificate": certificate}
    page = page_of(made_run([step(1)], files={"merged/merge.json": merge}))
    for one in words:
        assert one in page.text, one
    judged = certificate is not None and certificate.get("limit", 0) is not None
    assert ("The certificate" in page.text) == judged


def test_answers_are_shown_where_all_models_have_them(made_run):
    lines = [{"key": {}}, *({"row": row, "where": f"r.jsonl:{row + 1}", "prompt": f"p{row}", "generated": "yes",
                             "references": ["yes"]} for row in (5, 1, 0))]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    found = {"rows": 6, "models": {"base": {}, "adapter": {}, "unanswered": {}}}
    files = {"eval/g.json": found, "eval/g.base.jsonl": text.replace("yes", "no", 1), "eval/g.adapter.jsonl": text}
    page = page_of(made_run([step(1)], files=files))
    assert [text.strip() for text in page.rows] == [
        "p0", "yes", "yes", "yes", "p1", "yes", "yes", "yes", "p5", "yes", "no", "yes",
    ]  # fmt: skip
    assert page.text.count("✓ as expected") == 5


def test_whatever_the_data_say_the_page_loads_nothing_and_runs_nothing(made_run):
    text = "".join(json.dumps(line) + "\n" for line in ANSWERS)
    found = {**suite(base=3.0, adapter=2.0), "notes": [HOSTILE]}
    found["models"]["adapter"][HOSTILE] = {"value": 0.5}
    files = {
        "eval/<b>g.json": found, "eval/<b>g.base.jsonl": text, "eval/<b>g.adapter.jsonl": text,
        "merged/merge.json": {"dtype": HOSTILE, "base": HOSTILE, "certificate": {HOSTILE: HOSTILE, "held": True}},
    }  # fmt: skip
    facts = {**FACTS, "device": HOSTILE, "packages": {HOSTILE: HOSTILE}, "date": HOSTILE}
    lines = [step(1), {"step": 1, f"{HOSTILE}accuracy": 0.5, HOSTILE: "x"}]
    name = HOSTILE.replace("\ud800", "").replace("\x1b", "")
    folder = made_run(lines, facts, files, model={"name_or_path": name}, evaluation={"best_metric": name})
    page = page_of(folder)
    assert {tag for tag, _ in page.seen}.isdisjoint({"script", "img", "link", "iframe", "object", "a", "form", "b"})
    for _, attributes in page.seen:
        assert not [name for name in attributes if name in ("src", "href") or name.startswith("on")]
    written = (folder / "report.html").read_text(encoding="utf-8")
    assert "\x1b" not in written
    assert "\u202e" not in written
    assert "default-src 'none'; style-src 'unsafe-inline'" in written
    assert "<script" not in written
    assert any("מצב 😀" in text for text in page.rows)


def test_figures_have_titles_and_descriptions_and_rows_have_headings(made_run):
    page = page_of(made_run([step(1), step(2), step(3, loss=4.0)]))
    ids = {attributes["id"] for tag, attributes in page.seen if tag in ("title", "desc") and "id" in attributes}
    for _, attributes in ((tag, found) for tag, found in page.seen if tag == "svg"):
        assert set((attributes["aria-labelledby"] or "").split()) <= ids
    assert "train: 5 at step 1, 4 at step 3; least 2.5, most 5." in page.text
    assert ("th", {"scope": "row"}) in page.seen
    assert ("th", {"scope": "col"}) in page.seen


def test_a_long_run_makes_a_page_of_ordinary_size(made_run):
    folder = made_run([step(at) for at in range(1, 20_001)])
    assert len(run_page(read_run(folder))) < 400_000
