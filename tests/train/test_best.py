"""The best evaluation is kept, the run stops where nothing is gained, and a resumed run judges as one never stopped."""

from __future__ import annotations

import hashlib
import json
import math
import shutil

import pytest

from qlora_cli import commands
from qlora_cli.display import QuietReport
from qlora_cli.errors import UserError
from qlora_cli.train.best import Best, judged

WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize(("lower", "values"), [(True, [3, 2, 2, 4, 1]), (False, [1, 2, 2, 0, 3])])
def test_an_equal_evaluation_is_no_better_and_misses_count_since_the_best(lower, values):
    best, seen = None, []
    for step, value in enumerate(values):
        best = judged(Best("m", value, step), best, lower)
        seen.append((best.step, best.misses))
    assert seen == [(0, 0), (1, 0), (1, 1), (1, 2), (4, 0)]


def test_a_figure_that_is_none_is_never_the_best_beside_one():
    first = judged(Best("eval_loss", math.nan, 0), None, True)
    second = judged(Best("eval_loss", 2.0, 1), first, True)
    third = judged(Best("eval_loss", math.nan, 2), second, True)
    assert (second.step, third) == (1, Best("eval_loss", 2.0, 1, 1))


def train(recipe, pause_at=None):
    commands.train(recipe, b"", QuietReport(), main_process=True, resume="auto", pause_at=pause_at)


def metrics_of(run, key="eval_loss"):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[key] for line in lines if key in line}


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def overfitting(make_recipe, heldout_file, tmp_path):
    """A recipe whose held-out loss rises behind its first step; with keys of `evaluation` and a folder."""
    rows = {"train": [{"path": str(heldout_file.with_name("rows.jsonl"))}], "eval": [{"path": str(heldout_file)}]}

    def build(folder="run", steps=12, **evaluation):
        return make_recipe(
            data=rows,
            training={"max_steps": steps, "learning_rate": 0.15, "eval_steps": 1, "save_steps": 4,
                      "lr_scheduler": "constant", "warmup_ratio": 0.0},
            evaluation=evaluation,
            output_dir=str(tmp_path / folder),
        )  # fmt: skip

    return build


def test_the_adapter_is_that_of_the_best_evaluation(overfitting, tmp_path):
    train(overfitting(steps=3, best_metric="eval_loss"))
    losses = metrics_of(tmp_path / "run")
    best = min(losses, key=losses.__getitem__)
    assert 1 <= best < max(losses), f"the recipe must overfit for this test to mean anything: {losses}"
    paused = overfitting("paused", steps=3)
    train(paused, pause_at=best)
    of_that_step = tmp_path / "paused" / "checkpoints" / f"step-{best:06d}"
    assert digest(tmp_path / "run" / "adapter" / WEIGHTS) == digest(of_that_step / WEIGHTS)
    assert [path.name for path in (tmp_path / "run" / "best").iterdir()] == [f"step-{best:06d}"]
    assert "Trained by qlora" in (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert f"for {best} optimizer step" in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_it_stops_early_and_a_resumed_run_stops_at_the_same_step(overfitting, tmp_path):
    settings = {"best_metric": "eval_loss", "early_stopping_patience": 2}
    train(overfitting("whole", steps=40, **settings))
    losses = metrics_of(tmp_path / "whole")
    best = min(losses, key=losses.__getitem__)
    assert max(losses) == best + 2 < 40
    parts = overfitting("parts", steps=40, **settings)
    for pause in range(1, best + 3):
        train(parts, pause_at=pause)
    assert metrics_of(tmp_path / "parts") == losses
    train(parts)
    for name in ("adapter", f"best/step-{best:06d}"):
        assert digest(tmp_path / "parts" / name / WEIGHTS) == digest(tmp_path / "whole" / name / WEIGHTS)


def test_suites_run_in_training_and_may_be_the_metric(overfitting, tmp_path):
    recipe = overfitting(steps=3, during_training=["generate"], best_metric="generate.exact_match", max_new_tokens=4)
    train(recipe)
    assert sorted(metrics_of(tmp_path / "run", "generate.exact_match")) == [1, 2, 3]
    assert metrics_of(tmp_path / "run"), "the held-out loss is measured beside them"


def test_a_metric_that_nothing_measures_is_refused_before_a_weight_is_read(overfitting):
    known = "eval_loss, eval_perplexity, eval_token_accuracy"
    with pytest.raises(UserError, match=f"'eval_los' is not measured in training. Choose from {known}"):
        train(overfitting(best_metric="eval_los"))


class Told(QuietReport):
    """Keeps what is told."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def resumed(recipe, resume="auto", pause_at=None):
    report = Told()
    commands.train(recipe, b"", report, main_process=True, resume=resume, pause_at=pause_at)
    return report.lines


def test_values_of_other_rows_are_not_compared(overfitting, rows_file, tmp_path):
    first = overfitting(steps=3, best_metric="eval_loss")
    train(first, pause_at=1)
    others = tmp_path / "others.jsonl"
    others.write_text(rows_file.with_name("heldout.jsonl").read_text().splitlines()[0] + "\n")
    data = first.data.model_copy(update={"eval": [first.data.eval[0].model_copy(update={"path": str(others)})]})
    told = resumed(first.model_copy(update={"data": data}))
    assert any("the best evaluation so far, of step 1, is by another metric, or of other rows" in line for line in told)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000003" / "state.json").read_text())
    assert state["best"]["step"] > 1


def test_another_metric_begins_anew(overfitting, tmp_path):
    train(overfitting(steps=3, best_metric="eval_loss"), pause_at=2)
    told = resumed(overfitting(steps=3, best_metric="eval_token_accuracy"))
    assert any("is by another metric" in line for line in told)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000003" / "state.json").read_text())
    assert state["best"]["metric"] == "eval_token_accuracy"


def test_a_run_that_was_stopped_early_and_killed_ends_where_it_was(overfitting, tmp_path):
    settings = {"best_metric": "eval_loss", "early_stopping_patience": 1}
    train(overfitting(steps=40, **settings))
    steps = metrics_of(tmp_path / "run")
    adapter = (tmp_path / "run" / "adapter" / WEIGHTS).read_bytes()
    shutil.rmtree(tmp_path / "run" / "adapter")  # killed before the result was written
    train(overfitting(steps=40, **settings))
    assert metrics_of(tmp_path / "run") == steps, "it trained on"
    assert (tmp_path / "run" / "adapter" / WEIGHTS).read_bytes() == adapter


def test_a_checkpoint_that_goes_on_in_another_folder_brings_its_best_adapter(overfitting, tmp_path):
    train(overfitting(steps=3, best_metric="eval_loss"), pause_at=2)
    kept = tmp_path / "run" / "best" / "step-000001" / WEIGHTS
    resumed(overfitting("other", steps=3, best_metric="eval_loss"), str(tmp_path / "run/checkpoints/step-000002"))
    assert (tmp_path / "other" / "adapter" / WEIGHTS).read_bytes() == kept.read_bytes()


def test_a_best_adapter_that_is_gone_does_not_count(overfitting, tmp_path):
    train(overfitting(steps=3, best_metric="eval_loss"), pause_at=2)
    shutil.rmtree(tmp_path / "run" / "best")
    told = resumed(overfitting(steps=3, best_metric="eval_loss"))
    assert any("has no adapter any more" in line for line in told)
    assert [path.name for path in (tmp_path / "run" / "best").iterdir()] == ["step-000003"]
