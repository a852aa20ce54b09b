"""The part of a model card that a run writes: what is in it, and that people's own words stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_cli.train.card import BEGIN, END, certificate, keys, part, refresh, table, with_place
from qlora_cli.train.run import Run
from tests.merge_runs import finish_run

CERTIFICATE = {
    "held": True,
    "mean_kl": 1.5e-4,
    "p99_kl": 2e-3,
    "top1_agreement": 0.995,
    "positions": 5351,
    "loss_unmerged": 0.5,
    "loss_merged": 0.51,
    "limit": 5e-3,
    "default_limit": 5e-3,
    "rows": 64,
    "manner": "whole",
}
MERGE = {"dtype": "bfloat16", "base": "dequantized", "certificate": CERTIFICATE}


@pytest.fixture
def written(make_recipe, tmp_path) -> tuple[Path, Run]:
    """A folder with a card that has a place, and a run without any file."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "README.md").write_text(with_place("# Mine\n"))
    (tmp_path / "run").mkdir()
    return folder, Run(tmp_path / "run")


def test_people_s_words_stay_around_the_run_s_part(written, make_recipe):
    folder, run = written
    card = folder / "README.md"
    card.write_text("Before.\n" + card.read_text() + "\nAfter.\n")
    for _ in range(2):
        refresh(folder, run, make_recipe())
        text = card.read_text()
        assert text.startswith("Before.\n# Mine\n")
        assert text.endswith(f"{END}\n\nAfter.\n")
        assert text.count("## Results") == text.count("## Versions") == text.count(BEGIN) == text.count(END) == 1


@pytest.mark.parametrize("lost", [BEGIN, END])
def test_where_a_mark_is_deleted_nothing_is_written(written, make_recipe, lost):
    folder, run = written
    card = folder / "README.md"
    card.write_text(card.read_text().replace(lost, "mine now"))
    before = card.read_text()
    refresh(folder, run, make_recipe())
    assert card.read_text() == before
    card.unlink()
    refresh(folder, run, make_recipe())
    assert not card.exists()


def test_paths_of_this_machine_are_not_told(make_recipe, tmp_path):
    told = keys(make_recipe(data={"eval": [{"path": str(tmp_path / "secret" / "held.jsonl")}]}))
    assert "held.jsonl" in told
    assert str(tmp_path) not in told
    assert "output_dir" not in told
    assert "learning_rate: 0.01" in told


def test_a_name_cannot_break_a_table():
    assert table(["a|b", "c\nd"], [["1", "2"]]).splitlines()[0] == "| a\\|b | c d |"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "The certificate holds: the limit of the mean KL is 5e-03."),
        ({"limit": 1.0}, "The certificate holds: the limit of the mean KL is 1e+00, asked for (5e-03 by default)."),
        ({"held": False}, "The certificate does **not** hold"),
        ({"manner": "streamed"}, "read from the disk a layer at a time"),
        (
            {"limit": None},
            "In bfloat16, dequantized base, against the unmerged model over 5,351 positions of 64 rows.\n",
        ),
    ],
)
def test_a_certificate_in_words(change, words):
    assert words in certificate(MERGE | {"certificate": CERTIFICATE | change})


def test_a_merge_that_was_not_verified_says_so():
    assert "was not verified" in certificate(MERGE | {"certificate": None})
    assert certificate(None) == ""


def test_without_measurements_the_card_says_so(written, make_recipe):
    _, run = written
    assert "Not measured on held-out rows." in part(run, make_recipe(), None)


def test_of_training_the_best_evaluation_is_told_where_one_is_kept(written, make_recipe):
    _, run = written
    lines = [{"step": step, "eval_loss": loss, "eval_rows": 4} for step, loss in ((2, 0.5), (4, 0.75))]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in [{"step": 1, "loss": 3.0}, *lines]))
    assert "after step 4: loss 0.75, rows 4." in part(run, make_recipe(), None)
    (run.best / "step-000002").mkdir(parents=True)
    assert "after step 2: loss 0.5, rows 4." in part(run, make_recipe(), None)


def test_cards_of_a_run_have_data_results_certificate_and_versions(tiny_model, rows_file, qlora, tmp_path):
    """Trained, merged and measured: each adds what it knows, on the adapter's card and on the merged model's."""
    run = finish_run(tmp_path, tiny_model, rows_file)
    adapter, merged = run / "adapter" / "README.md", run / "merged" / "README.md"
    trained = adapter.read_text()
    facts = json.loads((run / "run.json").read_text())
    assert f"| train | {rows_file.name} | `{facts['data']['files'][str(rows_file)]}` |" in trained
    assert "12 rows" in trained
    assert facts["fingerprints"]["data"] in trained
    assert "torch 2." in trained
    assert "## Merged" not in trained
    assert qlora("merge", run).code == 0
    for card in (adapter, merged):
        assert "The certificate holds" in card.read_text()
    assert qlora("eval", run, "--baseline", "--merged", run / "merged").code == 0
    for card in (adapter, merged):
        assert "| loss, 4 rows | base | adapter | merged |" in card.read_text()
    assert merged.read_text().startswith("---\nbase_model: ")
    assert "library_name: transformers" in merged.read_text()


def test_the_hash_of_a_data_file_is_its_sha256(tiny_model, rows_file, tmp_path):
    import hashlib

    run = finish_run(tmp_path, tiny_model, rows_file)
    files = json.loads((run / "run.json").read_text())["data"]["files"]
    assert files == {str(rows_file): hashlib.sha256(rows_file.read_bytes()).hexdigest()}
