"""The tokenizer of a base: what is missing is named."""

from __future__ import annotations

import shutil
from importlib.util import find_spec

import pytest

from qlora_cli.errors import Exit, UserError
from qlora_cli.model.tokenizer import SENTENCEPIECE, load_tokenizer
from qlora_cli.recipe.schema import Model
from tests.architectures import PUBLISHED
from tests.tiny import tiny_tokenizer


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_a_sentencepiece_file_alone_names_the_package_that_reads_it(shared, architecture, tmp_path, name):
    folder = tmp_path / "base"
    folder.mkdir()
    shutil.copy(architecture("t5") / "config.json", folder)
    shutil.copy(shared / "tokenizers/llama2/tokenizer.model", folder / name)
    model = Model(name_or_path=str(folder), task="seq2seq_lm")
    with pytest.raises(UserError, match=rf"{name}: reading it without a tokenizer\.json needs sentencepiece") as error:
        load_tokenizer(folder, model)
    assert error.value.code == Exit.ENVIRONMENT
    assert "Run `pip install sentencepiece" in str(error.value)
    tiny_tokenizer().save_pretrained(folder)
    assert load_tokenizer(folder, model).eos_token_id is not None


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_folder_without_any_tokenizer_says_so_and_gets_none_of_special_tokens_alone(architecture, tmp_path, name):
    shutil.copy(architecture(name) / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"no tokenizer could be loaded: .*Put the tokenizer's files into the model"):
        load_tokenizer(tmp_path, Model(name_or_path=str(tmp_path), task="sequence_classification"))


def test_a_tokenizer_of_bytes_needs_no_file(architecture, tmp_path):
    shutil.copy(architecture("t5") / "config.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    tokenizer = load_tokenizer(tmp_path, Model(name_or_path=str(tmp_path), task="seq2seq_lm"))
    assert tokenizer("a")["input_ids"] == [ord("a") + 3, 1]
