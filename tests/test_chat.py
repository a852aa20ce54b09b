"""`qlora chat`: what is fed, what is said, in scripts, pipes and on a terminal, and what is refused."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_cli.chat.dialogue import Dialogue
from qlora_cli.chat.pieces import Pieces
from qlora_cli.chat.session import Session, opened
from qlora_cli.chat.wanted import Sampling, Voices
from qlora_cli.data.chat import chat_settings
from qlora_cli.data.examples import load_examples
from qlora_cli.data.prompts import Prompts
from qlora_cli.errors import UserError
from qlora_cli.recipe import load_recipe
from qlora_cli.recipe.schema import Data
from tests.tiny import tiny_tokenizer, write_tiny_model


class Silent:
    """A report that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


def values_of(tiny_model: Path, rows_file: Path, run: Path) -> dict[str, Any]:
    return {
        "model": {"name_or_path": str(tiny_model)},
        "quantization": {"compute_dtype": "float32"},
        "adapter": {"r": 8, "alpha": 16},
        "data": {"train": [{"path": str(rows_file)}], "max_length": 256},
        "training": {"max_steps": 4, "micro_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 1e-2,
                     "optimizer": "adamw"},
        "evaluation": {"max_new_tokens": 8},
        "output_dir": str(run),
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model, rows_file) -> Path:
    """A finished run of four steps with its merged model."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values_of(tiny_model, rows_file, folder / "run")))
    done = subprocess.run(
        [sys.executable, "-m", "qlora_cli", "train", str(folder / "recipe.yaml")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    import peft

    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(str(folder / "run" / "adapter"), dtype=torch.float32)
    adapted.merge_and_unload().save_pretrained(folder / "run" / "merged")
    AutoTokenizer.from_pretrained(folder / "run" / "adapter").save_pretrained(folder / "run" / "merged")
    return folder / "run"


def session_of(run: Path, sampling: Sampling | None = None, **voices: Any) -> Any:
    return opened(load_recipe(run / "resolved.yaml"), Silent(), Voices(**voices), sampling or Sampling())


def said(dialogue: Dialogue, text: str) -> str:
    """What a reply says piece by piece, which is what it is."""
    heard: list[str] = []
    reply = dialogue.ask(text, heard.append)
    assert "".join(heard) == reply.text
    return reply.text


def plainly(session: Session, model: Any, ids: list[int], number: int) -> str:
    """What plain transformers makes of the ids, greedily."""
    tokenizer = session.speakers[0].base.tokenizer
    input_ids = torch.tensor([ids])
    output = model.generate(
        input_ids=input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=number, do_sample=False
    )[0, len(ids) :].tolist()
    kept = output[: output.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in output else output
    return tokenizer.decode(kept, skip_special_tokens=True)


# ── what is fed and what is said ─────────────────────────────────────────────────────────────────────────────────────


def test_the_ids_before_every_answer_are_those_of_training(tmp_path):
    turns = [("hi", "hello ✓"), (" again \n", "yes"), ("日本", "no")]
    messages = [{"role": "system", "content": "short"}]
    for question, reply in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    tokenizer, data = tiny_tokenizer(), Data(train=[{"path": str(tmp_path / "rows.jsonl")}])
    stops, today = frozenset({tokenizer.eos_token_id}), date(2026, 1, 1)
    (row,) = load_examples(data, "train", tokenizer, stops, seed=0, today=today).rows
    begins = [at for at in range(1, row.num_tokens) if row.labels[at] >= 0 and row.labels[at - 1] < 0]
    with Prompts(chat_settings(data, tokenizer, stops, today)) as prompts:
        for turn, begin in enumerate(begins):
            assert prompts.of(messages[: 2 * turn + 2]).ids == list(row.input_ids[:begin])
    assert len(begins) == len(turns)


@pytest.mark.parametrize("who", ["adapter", "base", "merged"])
def test_replies_over_several_turns_are_those_of_plain_transformers_and_peft(run, tiny_model, who):
    import peft
    from transformers import BitsAndBytesConfig

    from qlora_cli.quant.bitsandbytes import disarm_cpu_repacking
    from qlora_cli.quant.linear4bit import work_round_cpu_dequantize

    if who == "merged":
        model: Any = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    else:
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=four_bit, dtype=torch.float32)
        disarm_cpu_repacking(model)
        work_round_cpu_dequantize(model)
        model = model if who == "base" else peft.PeftModel.from_pretrained(model, str(run / "adapter"))
    model.eval()
    kept = []
    with session_of(run, Sampling(max_new_tokens=20), base=who == "base", merged=who == "merged") as session:
        dialogue = Dialogue(session, session.speakers[0])
        for text in ("say 1", "say na na 2", "and ✓?"):
            ids = session.prompts.of([*dialogue.messages, {"role": "user", "content": text}]).ids
            expected = plainly(session, model, ids, 20)
            assert said(dialogue, text).rstrip("\ufffd") == expected.rstrip("\ufffd")
            kept.append(dialogue.replies[-1].kept_tokens)
    assert kept[0] == 0
    assert kept[2] > kept[1] > 0, "what was read in the turn before is not read again"


def test_baseline_asks_base_and_adapter_and_each_keeps_its_own_conversation(run):
    def alone(**voices: Any) -> list[str]:
        with session_of(run, **voices) as session:
            dialogue = Dialogue(session, session.speakers[0])
            return [said(dialogue, text) for text in ("say 1", "say 2")]

    with session_of(run, baseline=True) as session:
        both = [Dialogue(session, speaker) for speaker in session.speakers]
        found = [[said(dialogue, text) for dialogue in both] for text in ("say 1", "say 2")]
        assert [speaker.name for speaker in session.speakers] == ["base", "adapter"]
    assert [list(column) for column in zip(*found, strict=True)] == [alone(base=True), alone()]
    assert alone() != alone(base=True)


def test_a_stop_token_ends_a_reply_and_is_not_said(run):
    with session_of(run, Sampling(max_new_tokens=30)) as session:
        dialogue = Dialogue(session, session.speakers[0])
        ids = session.prompts.of([{"role": "user", "content": "say 1"}]).ids
        dialogue.ask("say 1", lambda text: None)
        first = dialogue.replies[0]
        base = session.speakers[0].base
        third = base.tokenizer(first.text)["input_ids"][2]
        object.__setattr__(base, "stop_token_ids", frozenset({third}))
        dialogue.reset()
        reply = dialogue.ask("say 1", lambda text: None)
    assert (reply.stopped, reply.prompt_tokens) == ("stop token", len(ids))
    assert first.text.startswith(reply.text)
    assert reply.generated_tokens <= 2


def test_drawn_replies_are_repeated_by_their_seed_and_regenerated_otherwise(run):
    def drawn(seed: int) -> list[str]:
        with session_of(run, Sampling(20, 1.5, 0.9, seed)) as session:
            dialogue = Dialogue(session, session.speakers[0])
            return [said(dialogue, "say 1"), dialogue.again(lambda text: None).text]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    first, again = drawn(1)
    assert first != again


@pytest.mark.parametrize("text", ["日本語 🤗 déjà vu", "a\n b\n\n  c ", "🏳️‍🌈" * 5])
def test_pieces_are_whole_characters_and_together_the_text(text):
    tokenizer = tiny_tokenizer()  # a token per byte
    pieces = Pieces(tokenizer)
    given = [pieces.add(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(given) + pieces.rest() == text
    assert not any("\ufffd" in piece for piece in given)
    assert max(map(len, given)) == 1


def test_pieces_of_sentencepiece_keep_their_spaces_and_line_breaks(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "weights" / "stories260k-hf")
    for text in ("Once upon a time,\nthere was 日本 a cat.\n\n  She sat.", "you 🤗🤗 me"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = Pieces(tokenizer)
        assert "".join(map(pieces.add, ids)) + pieces.rest() == tokenizer.decode(ids)
        behind = Pieces(tokenizer, ids[:1])
        given = "".join(map(behind.add, ids[1:])) + behind.rest()
        assert tokenizer.decode(ids[:1]) + given == tokenizer.decode(ids)


def test_half_a_character_at_the_end_is_shown_as_one():
    pieces = Pieces(tiny_tokenizer())
    given = [pieces.add(token) for token in tiny_tokenizer()("a日")["input_ids"][:3]]
    assert [*given, pieces.rest()] == ["a", "", "", "\ufffd"]


# ── scripts and pipes ────────────────────────────────────────────────────────────────────────────────────────────────


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
    assert "no chat template: each text is put into the prompt of question_answer rows" in ended.err
    assert json.loads(ended.out)["prompt_tokens"] == len("Question: 2+2?\nAnswer:")
    ended = qlora("chat", model, "--prompt", "2+2?", "--json")
    assert "each text is continued as it stands" in ended.err
    assert json.loads(ended.out)["prompt_tokens"] == 4


def test_a_sequence_to_sequence_model_reads_a_source_and_writes_a_target(architecture, qlora):
    folder = architecture("bart")
    ended = qlora(
        "chat", folder, "--set", "model.task=seq2seq_lm", "--prompt", "hello", "--max-new-tokens", 5, "--json"
    )
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    assert result["prompt_tokens"] == len(AutoTokenizer.from_pretrained(folder)("hello")["input_ids"])
    assert result["generated_tokens"] <= 5


# ── on a terminal ────────────────────────────────────────────────────────────────────────────────────────────────────


def drawn_tokens(run: Path, seed: int) -> int:
    """Tokens of the reply that a seed draws, up to 400."""
    with session_of(run, Sampling(400, 3.0, None, seed)) as session:
        return Dialogue(session, session.speakers[0]).ask("say 1", lambda text: None).generated_tokens


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, *arguments: str, columns: int = 80) -> None:
        self.seen, self.at = "", 0
        self.child, self.screen = pty.fork()
        if self.child == 0:
            os.environ.update(TERM="xterm", COLUMNS=str(columns), LINES="40")
            os.execv(sys.executable, [sys.executable, "-m", "qlora_cli", "chat", *arguments])

    def until(self, words: str, seconds: float = 60) -> str:
        """Reads until the words are there, behind those that were waited for last; what was read."""
        ends = time.monotonic() + seconds
        while (found := self.seen.find(words, self.at)) < 0:
            assert time.monotonic() < ends, f"no {words!r} in {self.seen[self.at :]!r}"
            if select.select([self.screen], [], [], 0.1)[0]:
                self.seen += os.read(self.screen, 4096).decode(errors="replace")
        begun, self.at = self.at, found + len(words)
        return self.seen[begun : self.at]

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def ended(self) -> int:
        """Its exit code, once it has ended; it has half a minute."""
        ends = time.monotonic() + 30
        while not (gone := os.waitpid(self.child, os.WNOHANG))[0]:
            if select.select([self.screen], [], [], 0.1)[0]:
                with suppress(OSError):  # nothing comes any more
                    self.seen += os.read(self.screen, 4096).decode(errors="replace")
            if time.monotonic() > ends:
                os.kill(self.child, signal.SIGKILL)
        os.close(self.screen)
        return os.waitstatus_to_exitcode(gone[1])


def test_ctrl_c_ends_a_reply_and_keeps_the_session_and_at_the_prompt_ends_it(run):
    seed = next(seed for seed in range(50) if drawn_tokens(run, seed) == 400)  # it must not end by itself
    terminal = Terminal(str(run), "--max-new-tokens", "400", "--temperature", "3", "--seed", str(seed))
    terminal.until("> ")
    terminal.type("say 1\n")
    terminal.until("say 1\r\n")
    time.sleep(0.1)
    os.kill(terminal.child, signal.SIGINT)
    terminal.until("the reply was cut")
    terminal.until("> ")
    terminal.type("/nonsense\n")
    terminal.until("/nonsense: no such command. See /help; two slashes begin a text with one.")
    terminal.until("> ")
    terminal.type("\x03")
    assert terminal.ended() == 130


def test_a_wide_terminal_shows_both_replies_side_by_side_and_ctrl_d_ends(run):
    terminal = Terminal(str(run), "--baseline", columns=120)
    terminal.until("> ")
    terminal.type("say 1\n")
    for _ in range(2):
        terminal.until("the reply was cut")
    terminal.until("> ")
    line = next(line for line in terminal.seen.splitlines() if "base" in line and "adapter" in line)
    assert line.index("adapter") - line.index("base") > 40
    terminal.type("\x04")
    assert terminal.ended() == 0


def test_control_characters_are_made_visible_on_a_terminal(run, monkeypatch, capsys):
    from qlora_cli import display_chat

    with session_of(run) as session:
        dialogue = Dialogue(session, session.speakers[0])
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        display_chat._printed(
            [dialogue], lambda one, say: (say("a\x1b[31mb\rc\n"), one.ask("say 1", lambda t: None))[1]
        )
    assert capsys.readouterr().out == "a\\x1b[31mb\\rc\n\n"


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1", "--prompt", "x"], "--temperature: is -1. Give 0 for the likeliest token"),
        (["--temperature", "nan", "--prompt", "x"], "--temperature: is nan."),
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
