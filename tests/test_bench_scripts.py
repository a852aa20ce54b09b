"""The scripts that measure run to their end on a small input, so that what docs/results.md says can be repeated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
NEEDED = ["text/gsm8k/train.jsonl", "text/llamafactory/alpaca_en_demo.json"]
TOKENIZER = "tokenizers/smollm2-135m-instruct/tokenizer.json"

pytestmark = pytest.mark.skipif(
    not all((SHARED / name).exists() for name in [*NEEDED, TOKENIZER]), reason="no ../shared/data"
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with 60 rows of each file."""
    for name in NEEDED:
        text = (SHARED / name).read_text(encoding="utf-8")
        rows = json.loads(text) if name.endswith(".json") else list(map(json.loads, text.splitlines()))
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows[:60])
        file.write_text(json.dumps(rows[:60]) if name.endswith(".json") else lines, encoding="utf-8")
    (tmp_path / "data" / "tokenizers").symlink_to(SHARED / "tokenizers")
    return tmp_path / "data"


def run(script: str, data: Path, *options: str) -> list[str]:
    """The table rows that a script prints."""
    command = [sys.executable, str(ROOT / "scripts" / script), str(data), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line for line in done.stdout.splitlines() if line.startswith("| ")]


def test_bench_data_runs_without_trl(data: Path, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    lines = run("bench_data.py", data, "--pairs", "1", "--limit", "50", "--rows", "300", "--json", str(result))
    found = json.loads(result.read_text())
    assert found["speed"][0]["ours"][0]["num_rows"] == 50
    assert found["rows"]["300"]["prepare"]["peak_bytes"] > 2**20
    assert [line.split("|")[1].strip() for line in lines[-4:]] == [
        *("order", "windows of order", "packed order", "windows of packed order"),
    ]


def test_bench_packing_runs(data: Path, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    small = ["--layers", "1", "--hidden", "36", "--length", "160", "--bins", "1", "--turns", "1"]
    small += ["--threads", "1", "--compute", "bfloat16"]
    lines = run("bench_packing.py", data, *small, "--json", str(result))
    found = json.loads(result.read_text())
    assert [(one["data"], one["dtype"]) for one in found] == [("gsm8k", "bfloat16"), ("alpaca", "bfloat16")]
    for one in found:
        assert 0 < one["share"] <= 1
        assert set(one["seconds"]) == {"padded", "auto", "packed"}
    assert len(lines) == 3


def test_same_rows_finds_another_id_and_another_trained_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "lib"))
    from data_runs import same_rows, write_ids  # type: ignore[import-not-found]

    rows = [([1, 2, 3], [-100, 2, 3]), ([4, 5], [-100, 5])]
    others = {
        "same": (rows, (2, 2, 2)),
        "id": ([rows[0], ([4, 6], [-100, 6])], (2, 1, 1)),
        "trained": ([([1, 2, 3], [-100, -100, 3]), rows[1]], (2, 2, 1)),
        "fewer": (rows[:1], (2, 0, 0)),
    }
    write_ids(str(tmp_path / "rows.npz"), rows)
    for name, (other, expected) in others.items():
        write_ids(str(tmp_path / f"{name}.npz"), other)
        assert same_rows(str(tmp_path / "rows.npz"), str(tmp_path / f"{name}.npz")) == expected, name


def test_the_errors_of_data_types_are_those_of_the_document() -> None:
    """All but the speed, which is the machine's."""
    document = (ROOT / "docs/quantization.md").read_text(encoding="utf-8").splitlines()
    table = document[document.index("## Error and speed") : document.index("## Memory of loading")]
    written = {line.split("|")[1]: line.split("|")[2:-2] for line in table if line.startswith("| ")}
    printed = {line.split("|")[1]: line.split("|")[2:-2] for line in run("code_errors.py", SHARED)}
    assert len(printed) == 14
    for name, figures in printed.items():
        if name.strip() != "data type":
            assert list(map(float, written[name])) == pytest.approx(list(map(float, figures)), rel=3e-3)


def test_bench_loftq_runs_and_both_find_the_same_error(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "scripts/bench_loftq.py"), "--size", "256", "--rank", "16"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--json", str(result)], check=True, cwd=ROOT, env=environment, capture_output=True)
    found = json.loads(result.read_text())
    assert found["qlora"]["error"] == pytest.approx(found["PEFT's steps"]["error"], rel=0.01)


def test_bench_loading_runs(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "scripts/bench_loading.py"), "--layers", "2", "--hidden", "128"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for embeddings, head_and_embedding in (("none", 2 * 2 * 32000 * 128), ("nf4", 2.516 * 32000 * 128)):
        options = ["--embeddings", embeddings, "--json", str(result)]
        subprocess.run([*command, *options], check=True, cwd=ROOT, env=environment, capture_output=True)
        found = json.loads(result.read_text())
        assert found["embedding_bytes"] == pytest.approx(head_and_embedding, rel=1e-3)
        assert found["embedding_bytes"] < found["model_bytes"] < found["file_bytes"]
