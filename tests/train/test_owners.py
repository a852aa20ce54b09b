"""An adapter is used on the base that it was trained on, wherever either has gone, and on no other in silence."""

from __future__ import annotations

import json
import shutil

import pytest

from qlora_cli import merging
from qlora_cli.errors import Exit, UserError
from qlora_cli.model.owner import OWNER
from qlora_cli.train.run import Run
from tests.train.test_started_runs import INT2, Kind, Report, base_of, bench, evaluate, train

__all__ = ["bench"]  # a fixture

PLAIN = Kind({"data_type": "int2"}, {})


@pytest.fixture
def continued(bench, tmp_path):
    """A run that went on from the start of a stored base, and that base."""
    base = shutil.copytree(base_of(bench.whole()), tmp_path / "stored")
    kind = Kind({}, {"r": 16, "alpha": 32, "from": str(base / "loftq_init")})
    recipe = bench.recipe(kind, tmp_path / "run", model={"name_or_path": str(base)})
    train(recipe)
    return Run(tmp_path / "run"), recipe, base


def test_an_adapter_of_a_base_that_has_been_renamed_is_refused_on_others(continued, bench, tmp_path):
    """The folder that its config names is gone: the content that it keeps is what tells."""
    run, recipe, base = continued
    base.rename(tmp_path / "renamed")
    plain = bench.recipe(PLAIN, tmp_path / "plain")
    with pytest.raises(UserError, match=f"was trained on {base}, which is not there any more, and this is") as error:
        evaluate(plain, run.adapter)
    assert error.value.code == Exit.REFUSED
    moved = recipe.model.model_copy(update={"name_or_path": str(tmp_path / "renamed")})
    before = evaluate(bench.recipe(INT2, bench.whole().folder), run.adapter)
    assert [*evaluate(recipe.model_copy(update={"model": moved})).values()] == [*before.values()]


def test_an_adapter_of_a_plain_base_is_refused_on_one_that_a_start_changed(bench, tmp_path):
    plain = bench.recipe(PLAIN, tmp_path / "plain")
    train(plain)
    adapter = Run(tmp_path / "plain").adapter
    assert not (adapter / OWNER).exists()
    with pytest.raises(UserError, match="that base belongs to the adapters that were trained on it") as error:
        evaluate(bench.recipe(INT2, bench.whole().folder), adapter)
    assert error.value.code == Exit.REFUSED
    assert evaluate(plain)["adapter"] > 0


def test_the_baseline_of_a_changed_base_is_its_start_on_either_way(continued, bench):
    run, recipe, _base = continued
    found = evaluate(recipe, baseline=True)
    assert found == evaluate(bench.recipe(INT2, bench.whole().folder), baseline=True)
    assert found.keys() == {"start", "adapter"}
    with pytest.raises(UserError, match=r"--base original: .*the weights as published are others") as error:
        merging.merge(run.folder, recipe, Report(), merging.Wanted(bases=("original",)))
    assert error.value.code == Exit.REFUSED


@pytest.mark.parametrize(
    ("section", "values", "told"),
    [
        ("quantization", {"data_type": "nf4"}, 'quantization.data_type is "int2" there, "nf4" here'),
        ("adapter", {"r": 2}, "adapter.r is 4 there, 2 here"),
        ("model", {"name_or_path": "elsewhere"}, 'model is ".*" there, "elsewhere" here'),
    ],
)
def test_a_key_that_would_change_nothing_on_the_stored_base_is_refused(section, values, told, bench):
    recipe = bench.recipe(INT2, bench.whole().folder, **{section: values})
    with pytest.raises(UserError, match=f"{told}, and the run's base is what was stored") as error:
        evaluate(recipe)
    assert error.value.code == Exit.REFUSED


def test_a_card_may_be_edited_and_the_base_stays_what_it_is(bench, tmp_path):
    run, recipe = bench.copy(tmp_path / "run")
    before = evaluate(bench.recipe(INT2, bench.whole().folder))
    for card in (base_of(run) / "README.md", run.adapter / "README.md"):
        card.write_text(card.read_text() + "\nIt is mine.\n")
    assert evaluate(recipe.model_copy(update={"output_dir": str(run.folder)})) == before


def test_the_rows_of_a_calibration_are_counted(bench, tmp_path):
    kind = Kind({"data_type": "int2"}, {"init": "loftq", "loftq": {"calibration": 1000, "iterations": 1}})
    told = train(bench.recipe(kind, tmp_path / "run"), pause_at=1)
    assert any("what 12 of 12 rows feed into each layer (1,000 were asked for)" in line for line in told)
    record = json.loads((base_of(Run(tmp_path / "run")) / "start.json").read_text())
    assert record["made_from"]["calibration_rows"] == 12
