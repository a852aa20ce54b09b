"""What `qlora chat` refuses, and what it notes."""

from __future__ import annotations

import errno
import json
import os
from datetime import date
from pathlib import Path

import pytest

from qlora_cli.chat.dialogue import Dialogue
from qlora_cli.chat.session import opened, with_trained_template
from qlora_cli.chat.wanted import COLDEST, HOTTEST, Sampling, Voices
from qlora_cli.data.chat import chat_settings
from qlora_cli.data.prompts import Prompts
from qlora_cli.errors import UserError
from qlora_cli.model.base import find_base
from qlora_cli.recipe import load_recipe
from qlora_cli.recipe.schema import Data
from qlora_cli.train.run import Run
from tests.chat.conftest import Silent, session_of
from tests.tiny import tiny_tokenizer, write_tiny_model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1", "--prompt", "x"], "--temperature: is -1. Give 0 for the likeliest token"),
        (["--temperature", "nan", "--prompt", "x"], "--temperature: is nan."),
        (["--temperature", "1e-40", "--prompt", "x"], "--temperature: is 1e-40. Give 0 for the likeliest token,"),
        (["--temperature", "inf", "--prompt", "x"], "--temperature: is inf."),
        (["--temperature", "1", "--top-p", "0", "--prompt", "x"], "--top-p: is 0. Give a share above 0 and up to 1"),
        (["--top-p", "0.9", "--prompt", "x"], "--top-p: has no effect: at temperature 0 the likeliest token is taken."),
        (["--seed", "1", "--prompt", "x"], "--seed: has no effect: at temperature 0"),
        (["--temperature", "1", "--seed", "-1", "--prompt", "x"], "--seed: is -1. Give a whole number from 0"),
        (["--max-new-tokens", "0", "--prompt", "x"], "--max-new-tokens: is 0. Give a whole number, at least 1."),
        (["--base", "--merged"], "--base, --merged: name different models to talk to. Leave all but one of them out."),
        (["--prompt", "-", "--prompt", "-"], "--prompt -: is given twice, and stdin is read once."),
        (["--prompt", " "], "the text: is empty. Write what is to be answered."),
        (["--prompt", "a<|im_end|>b"], "the conversation: the text of message 1 (user) holds the control token"),
        (["--prompt", "x " * 300], "takes 619 tokens, and the model has 512 positions for it and the reply."),
        (["--adapter", "nowhere", "--prompt", "x"], "nowhere: no adapter there. Run `qlora train`, or talk"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused(run, qlora, arguments, message):
    ended = qlora("chat", run, *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err


def test_folders_that_cannot_answer_are_refused(run, tmp_path, qlora):
    ended = qlora("chat", run / "adapter", "--prompt", "x")
    assert ended.code == 2
    assert "is an adapter's folder, and an adapter answers on its base alone. Name its run" in ended.err
    assert "no run folder (no resolved.yaml)" in qlora("chat", tmp_path, "--prompt", "x").err
    ended = qlora("chat", run / "merged", "--set", "model.task=question_answering", "--prompt", "x")
    assert "model.task: is question_answering, which writes no text: there is nothing to chat with." in ended.err
    (problem,) = json.loads(qlora("chat", run, "--json").out)["problems"]
    assert problem == {
        "where": "--json",
        "what": "is the answer to --prompt",
        "todo": "add --prompt TEXT, or leave it out",
    }
    ended = qlora("chat", run / "merged", "--set", "training.seed=1", "--prompt", "x")
    assert "--set training.seed=1: sets nothing that counts here." in ended.err
    assert "--base: needs a run or a recipe" in qlora("chat", run / "merged", "--base", "--prompt", "x").err


def test_another_base_and_another_template_are_told(run, tmp_path, tiny_model):
    other = write_tiny_model(tmp_path / "other", rms_norm_eps=1e-3)
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text("{{ '' }}" + template)
    report = Silent()
    recipe = load_recipe(run / "resolved.yaml", [f"model.name_or_path={other}"])
    with opened(recipe, report, Voices(), Sampling()):
        pass
    assert any("the base differs from the one trained on" in line for line in report.lines)
    assert any(f"the template that was trained with is the adapter's: {run}" in line for line in report.lines)


def test_a_template_without_an_end_is_ended(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    settings = chat_settings(Data(train=[{"path": "x"}]), tokenizer, frozenset(), date(2026, 1, 1))
    with Prompts(settings, row_seconds=0.5) as prompts, pytest.raises(UserError) as error:
        prompts.of([{"role": "user", "content": "x"}])
    assert "takes more than 0.5 s of processor time (30 to compile). Use a template that you trust." in str(error.value)


def test_the_coldest_and_the_hottest_temperature_draw_tokens(run):
    for temperature in (COLDEST, HOTTEST):
        with session_of(run, Sampling(temperature=temperature)) as session:
            assert Dialogue(session, session.speakers[0]).ask("say 1", lambda text: None).generated_tokens


@pytest.mark.parametrize("facts", [{}, {"fingerprints": 5}, {"fingerprints": {"base": "x"}}])
def test_a_run_whose_facts_know_no_template_answers_with_its_own(run, tmp_path, facts):
    for name in ("adapter", "resolved.yaml"):
        (tmp_path / name).symlink_to(run / name)
    (tmp_path / "run.json").write_text(json.dumps(facts))
    recipe = load_recipe(run / "resolved.yaml")
    found = find_base(recipe)
    report = Silent()
    assert with_trained_template(recipe, Run(tmp_path), found, report) is recipe
    assert report.lines == []


def damaged_disk(monkeypatch) -> None:
    """From now on no file's content reaches the disk."""

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)


def test_what_cannot_be_saved_is_told_and_the_conversation_goes_on(run, tmp_path, monkeypatch):
    kept = tmp_path / "kept.jsonl"
    with session_of(run) as session:
        dialogue = Dialogue(session, session.speakers[0])
        dialogue.ask("say 1", lambda text: None)
        for name in (
            "~nosuchuser/x.jsonl",
            "a\0b",
            "\ud800",
            "x" * 300,
            "/",
            "none/x.jsonl",
            "/dev/null/x",
            str(tmp_path),
        ):
            with pytest.raises(UserError, match=r"cannot be written|is there already"):
                dialogue.save(Path(name))
        with monkeypatch.context() as patched:
            damaged_disk(patched)
            with pytest.raises(UserError, match=r"kept.jsonl: cannot be written: No space left on device"):
                dialogue.save(kept)
        assert [*tmp_path.iterdir()] == [], "nothing is left of what failed"
        dialogue.save(kept)
        with pytest.raises(UserError, match="is there already, and nothing is overwritten"):
            dialogue.save(kept)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.jsonl"]
    assert json.loads(kept.read_text())["messages"] == dialogue.messages
