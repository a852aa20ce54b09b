"""`qlora chat` in scripts and pipes."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from qlora_cli.chat.plain import templated
from qlora_cli.data.examples import load_examples
from qlora_cli.recipe.schema import Data
from tests.chat.conftest import values_of
from tests.tiny import tiny_tokenizer, write_tiny_model


def test_prompt_prints_the_replies_alone_and_json_gives_the_figures(run):
    command = [sys.executable, "-m", "qlora_cli", "chat", str(run), "--prompt", "say 1", "--prompt", "-"]
    done = subprocess.run([*command, "--json"], input="say 2\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [message["role"] for message in result["messages"]] == ["user", "assistant"] * 2
    assert [message["content"] for message in result["messages"]][::2] == ["say 1", "say 2"]
    assert result["replies"][1]["prompt_tokens"] == result["prompt_tokens"] > result["replies"][0]["prompt_tokens"]
    assert (result["model"], result["stopped"], result["generated_tokens"]) == ("adapter", "max_new_tokens", 8)
    assert result["tokens_per_s"] > 0
    done = subprocess.run(command, input=b"say 2\n", capture_output=True)
    replies = [message["content"] for message in result["messages"]][1::2]
    assert done.stdout.decode() == "".join(f"{reply}\n" for reply in replies)
    assert b"the reply was cut after 8 tokens; --max-new-tokens sets it" in done.stderr
    assert b"Warning" not in done.stderr


def test_a_pipe_is_a_conversation_with_commands(run, tmp_path, qlora_pipe):
    kept = tmp_path / "kept.jsonl"
    lines = [f'/system be brief\nsay 1\nsay \\\n2\n"""\nsay\n3\n"""\n//x\n/save {kept}\n/regenerate\n/quit\nno']
    done = qlora_pipe(run, input="".join(lines))
    assert done.returncode == 0, done.stderr
    (row,) = [json.loads(line) for line in kept.read_text().splitlines()]
    texts = [message["content"] for message in row["messages"] if message["role"] == "user"]
    assert row["messages"][0] == {"role": "system", "content": "be brief"}
    assert texts == ["say 1", "say \n2", "say\n3", "/x"]
    replies = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
    assert done.stdout == "".join(f"{reply}\n" for reply in [*replies, replies[-1]])
    assert "a reply in it was cut" in done.stderr
    again = qlora_pipe(run, input=f"say 1\n/save {kept}\n")
    assert again.returncode == 2
    assert f"{kept}: is there already, and nothing is overwritten. Name a new file." in again.stderr
    checked = load_examples(
        Data(train=[{"path": str(kept)}], max_length=512), "train", tiny_tokenizer(), frozenset(), seed=0,
        today=date(2026, 1, 1),
    )  # fmt: skip
    assert len(checked.rows) == 1


@pytest.fixture
def qlora_pipe():
    def ask(run: Path, *arguments: str, input: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "qlora_cli", "chat", str(run), *arguments]
        return subprocess.run(command, input=input, capture_output=True, text=True)

    return ask


def test_what_the_input_ends_in_the_middle_of_is_answered_or_refused(run, qlora_pipe):
    whole = qlora_pipe(run, input="say 1\n")
    cut = qlora_pipe(run, input="say 1\\")
    assert (cut.returncode, cut.stdout) == (0, whole.stdout)
    assert whole.stdout.strip()
    open_ = qlora_pipe(run, input='say 1\n"""say\n2\n/save kept.jsonl\n')
    assert (open_.returncode, open_.stdout) == (2, whole.stdout)
    assert 'the text: has no """ at its end. Close it with """.' in open_.stderr


def test_baseline_in_a_pipe_is_one_below_the_other_and_json_has_both(run, qlora):
    ended = qlora("chat", run, "--baseline", "--prompt", "say 1")
    assert ended.code == 0, ended.err
    result = json.loads(qlora("chat", run, "--baseline", "--prompt", "say 1", "--json").out)
    texts = [f"[{one['model']}]\n{one['reply']}\n" for one in result["models"]]
    assert ended.out == "".join(texts)
    assert [one["model"] for one in result["models"]] == ["base", "adapter"]


def test_a_merged_folder_answers_by_itself_as_through_its_run(run, qlora):
    through, alone = (
        json.loads(qlora("chat", *arguments, "--prompt", "say 1", "--max-new-tokens", 8, "--json").out)
        for arguments in ((run, "--merged"), (run / "merged",))
    )
    assert (through.pop("model"), alone.pop("model")) == ("merged", "model")
    assert through["reply"] == alone["reply"]


def test_a_model_without_a_template_continues_text_as_its_rows_were(tmp_path, rows_file, qlora):
    model = write_tiny_model(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "2"}) + "\n")
    values = values_of(model, tmp_path / "rows.jsonl", tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    ended = qlora("chat", tmp_path / "recipe.yaml", "--base", "--prompt", "2+2?", "--json")
    assert ended.code == 0, ended.err
    assert "chat     no chat template, and no text before it is remembered" in ended.err
    assert "chat     each text is put into the prompt of question_answer rows" in ended.err
    assert json.loads(ended.out)["prompt_tokens"] == len("Question: 2+2?\nAnswer:")
    values["data"]["train"][0]["template"] = {"prompt": "Q: {{ question }}\nA:", "completion": " {{ answer }}"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    ended = qlora("chat", tmp_path / "recipe.yaml", "--base", "--prompt", "2+2?", "--json")
    assert "each text is put into the prompt of data.train[0].template as its question" in ended.err
    assert json.loads(ended.out)["prompt_tokens"] == len("Q: 2+2?\nA:")
    ended = qlora("chat", model, "--prompt", "2+2?", "--json")
    assert "each text is continued as it stands" in ended.err
    assert json.loads(ended.out)["prompt_tokens"] == 4


@pytest.mark.parametrize(
    ("template", "asked"),
    [
        ("Data: {{ mr }}\n", "Data: {{x}}\n"),
        ("{{ a }} and {{ a }}{# not this #}", "{{x}} and {{x}}"),
        ("{{ a }}{{ b }}", None),
        ("{{ a | trim }}", None),
        ("{{ a.b }}", None),
        ("{% if a %}{{ a }}{% endif %}", None),
        ("{{ 'a' * 10**9 }}{{ b }}", None),
        ("no column", None),
        ("", None),
        ("{{", None),
    ],
)
def test_a_text_takes_the_place_of_the_one_column_of_a_template(template, asked):
    words, prompt = templated(template)
    assert (prompt and prompt("{{x}}")) == asked
    assert ("continued as it stands: the prompt in data.train[0].template is more" in words) == (asked is None)


def test_a_sequence_to_sequence_model_reads_a_source_and_writes_a_target(architecture, qlora):
    folder = architecture("bart")
    ended = qlora(
        "chat", folder, "--set", "model.task=seq2seq_lm", "--prompt", "hello", "--max-new-tokens", 5, "--json"
    )
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    assert result["prompt_tokens"] == len(AutoTokenizer.from_pretrained(folder)("hello")["input_ids"])
    assert result["generated_tokens"] <= 5


def test_a_start_that_changed_the_base_is_the_baseline_and_beams_come_whole(tmp_path, tiny_model, rows_file, qlora):
    values = values_of(tiny_model, rows_file, tmp_path / "run")
    values["adapter"]["init"] = "loftq"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert qlora("train", tmp_path / "recipe.yaml").code == 0
    both = json.loads(qlora("chat", tmp_path / "run", "--baseline", "--prompt", "say 1", "--json").out)["models"]
    assert [one["model"] for one in both] == ["start", "adapter"]
    for arguments, one in (((), both[1]), (("--base",), both[0])):
        alone = json.loads(qlora("chat", tmp_path / "run", *arguments, "--prompt", "say 1", "--json").out)
        assert (alone["model"], alone["reply"]) == (one["model"], one["reply"])
    beams = qlora("chat", tmp_path / "run", "--set", "evaluation.num_beams=3", "--prompt", "say 1", "--json")
    assert beams.code == 0, beams.err
    assert json.loads(beams.out)["generated_tokens"] <= 8


def test_the_speed_in_the_docs_can_be_measured(run, tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "bench_chat.py"
    command = [
        sys.executable,
        str(script),
        str(run),
        "--turns",
        "2",
        "--tokens",
        "4",
        "--json",
        str(tmp_path / "a.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "a.json").read_text())
    assert [len(values) for values in found.values()] == [2, 2]
    assert all(f"| {name} | " in done.stdout for name in found)
