"""The folder for Ollama: template, stop tokens, context, and one BOS."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest
from go_reader import execute, modelfile
from templates import SHAPES, TRIMMED, chat_of, settings_of

from qlora_cli.data.conversations import assistant, user
from qlora_cli.data.formats import FORMATS
from qlora_cli.errors import UserError
from qlora_cli.export import ollama
from qlora_cli.export.asked import COLUMNS, asked_of
from qlora_cli.export.ollama import Reading, adds_bos, quoted, read_template, write_ollama
from qlora_cli.export.source import Order, Source
from qlora_cli.export.turns import Turns, find_turns
from qlora_cli.recipe.schema import Source as Rows
from tests.tiny import write_tiny_model

ASKED = {
    "alpaca": {"instruction": 'Say "{x}"\n\n{{ y }}', "output": "b"},
    "question_answer": {"question": 'Say "{x}"', "answer": "b"},
    "summarisation": {"document": 'Say "{x}"', "summary": "b"},
}
"""Formats whose rows have a prompt around them, each with a row."""

MESSAGES = [user("Why?"), assistant("So."), user("And?")]
BOS_SHAPE = SHAPES["the system text in the user's turn"]


def reading_of(template: str | None) -> Reading:
    turns = None if template is None else find_turns(chat_of(template))
    return Reading(settings_of(template), turns, 512)


def order_of(out, file_type="f16") -> Order:
    return Order(out, file_type, None, lambda line: None)


def test_the_modelfile_has_template_stops_and_context():
    text, notes = ollama.modelfile("mine", reading_of(SHAPES["chatml"]), adds_bos=False)
    found = modelfile(text)
    wanted = chat_of(SHAPES["chatml"]).render(MESSAGES, "x", add_generation_prompt=True)
    assert execute(found["TEMPLATE"][0], MESSAGES) == wanted
    assert found["FROM"] == ["./model.gguf"]
    assert found["PARAMETER stop"] == ["<|im_end|>"]
    assert found["PARAMETER num_ctx"] == ["512"]
    assert notes == []


@pytest.mark.parametrize("shape", SHAPES)
def test_the_template_comes_out_of_the_modelfile_as_it_went_in(shape):
    reading = reading_of(SHAPES[shape])
    text, _notes = ollama.modelfile("mine", reading, adds_bos=False)
    assert modelfile(text)["TEMPLATE"] == [ollama.template_text(reading, False)[0]]


def test_llama_cpp_and_the_template_do_not_both_write_a_bos():
    wanted = chat_of(BOS_SHAPE).render(MESSAGES, "x", add_generation_prompt=True)
    assert wanted.startswith("<s>[INST]")
    by_template, notes = ollama.template_text(reading_of(BOS_SHAPE), adds_bos=False)
    assert (execute(by_template, MESSAGES), notes) == (wanted, [])
    by_llama_cpp, notes = ollama.template_text(reading_of(BOS_SHAPE), adds_bos=True)
    assert ("<s>" + execute(by_llama_cpp, MESSAGES), notes) == (wanted, [])


def test_a_bos_that_the_training_did_not_have_is_told():
    _text, notes = ollama.template_text(reading_of(SHAPES["chatml"]), adds_bos=True)
    assert notes == ["llama.cpp puts <s> in front, which the training template does not"]


def test_what_ollama_cannot_say_is_told_in_the_file_and_in_the_result():
    text, notes = ollama.modelfile("mine", reading_of(TRIMMED), adds_bos=False)
    assert "white space around a text is taken off" in notes[0]
    assert f"# note: {notes[0]}" in text
    notes = ollama.template_text(reading_of(SHAPES["no system text"]), adds_bos=False)[1]
    assert notes == ["the training template has no place for a system text: Ollama stops with an error at one"]


def test_a_template_with_a_date_says_that_it_stays():
    template = "{{ strftime_now('%Y') }}" + SHAPES["chatml"]
    text, notes = ollama.template_text(reading_of(template), adds_bos=False)
    assert execute(text, MESSAGES).startswith("2026<|im_start|>")
    assert "prints today's date; the Modelfile says 2026-01-01 for good" in notes[0]


def test_a_model_without_a_template_gets_what_is_asked_as_it_is():
    reading = reading_of(None)
    text, notes = ollama.template_text(reading, adds_bos=False)
    assert text == "{{ .Prompt }}"
    assert "no chat template" in notes[0]
    reading = replace(reading, settings=replace(reading.settings, bos=[1]))
    assert ollama.template_text(reading, adds_bos=False)[0] == "<s>{{ .Prompt }}"
    assert ollama.template_text(reading, adds_bos=True)[0] == "{{ .Prompt }}"


def test_every_format_with_a_prompt_is_tried_here():
    assert set(COLUMNS) == set(ASKED)


@pytest.mark.parametrize("name", ASKED)
def test_a_model_of_rows_with_a_prompt_is_asked_in_that_prompt(name):
    row = ASKED[name]
    content = FORMATS[name].read(row, "x")
    asked = asked_of([Rows(path="x", format=name)])
    assert asked.name == name
    text, notes = ollama.template_text(replace(reading_of(None), asked=asked), adds_bos=False)
    assert "{{ .Prompt }}" in text
    wanted = content.plain.pieces[0][0]
    before, prompt, behind = text.partition("{{ .Prompt }}")
    assert unquoted(before) + next(iter(row.values())) + unquoted(behind) == wanted
    assert notes == [
        f"the model has no chat template: what is asked goes into the prompt of its training rows ({name})"
    ]
    text, _notes = ollama.modelfile("mine", replace(reading_of(None), asked=asked), adds_bos=False)
    assert modelfile(text)["TEMPLATE"] == [before + prompt + behind]


def unquoted(text: str) -> str:
    """Template text as what Go writes."""
    return execute(text, []) if "{{" in text else text


def test_verbatim_rows_have_no_prompt_and_what_cannot_be_proven_is_named(tmp_path):
    assert asked_of([Rows(path="x", format="prompt_completion")]).around == ("", "")
    note = ollama.plain_text(asked_of([Rows(path="x", format="text")]))[1]
    assert note.endswith("goes to it as it is, as its training rows were")
    mixed = asked_of([Rows(path="x", format="alpaca"), Rows(path="x", format="question_answer")])
    text, note = ollama.plain_text(mixed)
    assert text == "{{ .Prompt }}"
    assert "without the prompt that its training rows had (alpaca, question_answer)" in note
    own = asked_of([Rows(path="x", template={"prompt": "Q: {{ q }}", "completion": "{{ a }}"})])
    assert "(data.train[].template)" in ollama.plain_text(own)[1]
    rows = tmp_path / "rows.jsonl"
    assert "cannot be told without the rows" in ollama.plain_text(asked_of([Rows(path=str(rows))]))[1]
    rows.write_text('{"question": "a", "answer": "b"}\n')
    assert asked_of([Rows(path=str(rows))]).name == "question_answer"


def test_the_settings_come_from_the_folder_and_the_run(tiny_model, tmp_path):
    reading = read_template(Source(tiny_model, "mine"))
    assert reading.turns == find_turns(chat_of(SHAPES["chatml"]))
    assert (reading.settings.stops, reading.context) == ({"<|im_end|>": 2}, 512)
    folder = write_tiny_model(tmp_path / "model", max_position_embeddings=100_000)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ mood }}"
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    reading = read_template(Source(folder, "mine", template_kwargs={"mood": "<good>"}))
    assert isinstance(reading.turns, Turns)
    assert reading.turns.between["user", "end"] == "<good>"
    assert set(reading.settings.stops) == {"<|im_end|>", "<|pad|>"}
    assert reading.context == 8192


def test_a_stop_token_that_a_modelfile_cannot_say_is_refused():
    assert quoted("</s> ▁x") == '"</s> ▁x"'
    with pytest.raises(UserError, match="a Modelfile cannot say"):
        quoted('a"b')
    with pytest.raises(UserError, match="a Modelfile cannot say"):
        quoted("a\nb")


def test_a_model_that_generates_no_text_is_refused(tiny_model, tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaForSequenceClassification"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="Ollama generates text, and this is a model for sequence_classification"):
        write_ollama(Source(folder, "mine"), order_of(tmp_path / "out"))


def test_the_folder_is_whole_and_its_bos_is_read_from_the_very_file(tmp_path, shared):
    pytest.importorskip("gguf")
    folder = shared / "weights" / "stories260k-hf"
    out = tmp_path / "an out"
    facts = write_ollama(Source(folder, "stories", inputs=(folder,)), order_of(out))
    assert {path.name for path in out.iterdir()} == {"model.gguf", "Modelfile", "manifest.json"}
    found = modelfile((out / "Modelfile").read_text())
    bos = "" if adds_bos(out / "model.gguf") else "<s>"
    assert found["TEMPLATE"] == [bos + "{{ .Prompt }}"]
    assert shlex.split(facts.commands[0]) == ["ollama", "create", "stories", "-f", str(out / "Modelfile")]
