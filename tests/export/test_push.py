"""Pushing: against a hub on this machine; the token is nowhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import fake_hub
from folders import write_adapter

from qlora_cli.errors import Exit, UserError
from qlora_cli.export.push import _told, check_push
from tests.conftest import REPOSITORY

TOKEN = "hf_canaryCANARYcanary0123456789"


def qlora(folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with no environment but what it is given; the home is the test's."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS") if name in os.environ}
    values = {**kept, "HOME": str(folder / "home"), "PYTHONPATH": str(REPOSITORY), **environment}
    command = [sys.executable, "-m", "qlora_cli", "export", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=values, capture_output=True, text=True)


def everywhere(folder: Path) -> bytes:
    """All bytes of all files below a folder."""
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_model) -> Path:
    return write_adapter(tmp_path_factory.mktemp("pushed") / "mine", tiny_model)


def test_what_was_exported_is_pushed_and_nothing_else(adapter, tiny_model, tmp_path):
    with fake_hub(TOKEN) as hub:
        done = qlora(
            *(tmp_path, adapter, "--to", "peft", "--out", "out", "--push", "me/it", "--base-name", "me/base"),
            HF_TOKEN=TOKEN, HF_ENDPOINT=hub.address,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"pushed    {hub.address}/me/it/commit/{'1' * 40}" in done.stdout
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "README.md", "tokenizer.json"} <= set(hub.files)
    sent = b"".join(hub.files.values())
    assert str(tiny_model).encode() not in sent
    (made,) = hub.repositories.values()
    assert made.get("private", made.get("visibility")) in (True, "private")
    assert TOKEN.encode() not in everywhere(tmp_path) + sent
    assert TOKEN not in done.stdout + done.stderr


def test_a_public_repository_is_made_where_that_is_asked_for(adapter, tmp_path):
    with fake_hub(TOKEN) as hub:
        options = ("--to", "peft", "--out", "out", "--push", "me/it", "--base-name", "me/base", "--public", "--json")
        done = qlora(tmp_path, adapter, *options, HF_TOKEN=TOKEN, HF_ENDPOINT=hub.address)
    assert done.returncode == 0, done.stderr
    (made,) = hub.repositories.values()
    assert made.get("private", made.get("visibility")) in (False, "public", None)


@pytest.mark.parametrize(
    ("endpoint", "token", "code", "told"),
    [
        ("hub", "hf_wrong" + TOKEN, Exit.ENVIRONMENT, "the hub does not take the token"),
        ("http://127.0.0.1:9", TOKEN, Exit.FAILED, "the hub did not take it: "),
    ],
)
def test_a_hub_that_refuses_or_is_not_there_is_one_line_without_the_token(
    adapter, tmp_path, endpoint, token, code, told
):
    with fake_hub(TOKEN) as hub:
        done = qlora(
            *(tmp_path, adapter, "--to", "peft", "--out", "out", "--push", "me/it", "--base-name", "me/base"),
            HF_TOKEN=token, HF_ENDPOINT=hub.address if endpoint == "hub" else endpoint,
        )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert "hole in out" in done.stderr
    assert done.stderr.count("\n") == 1, "no traceback"
    assert TOKEN not in done.stdout + done.stderr
    assert TOKEN.encode() not in everywhere(tmp_path)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists(), "the export itself is there"


def test_without_a_token_nothing_is_written(adapter, tmp_path):
    (tmp_path / "home" / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / "home" / ".cache" / "huggingface" / "token").write_text(TOKEN)
    done = qlora(tmp_path, adapter, "--to", "peft", "--out", "out", "--push", "me/it", "--base-name", "me/base")
    assert (done.returncode, done.stdout) == (Exit.ENVIRONMENT, "")
    assert "HF_TOKEN is not set in the environment, and nothing else is read for a token. Run `export HF_TOKEN" in (
        done.stderr
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rest", ["\nabcdefTAIL", "\r\nX: y", "é", " two", "\x01"])
def test_a_token_that_no_header_can_carry_is_refused_and_not_quoted(rest, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN + rest + "tail")
    with pytest.raises(UserError, match="HF_TOKEN holds spaces, line breaks") as error:
        check_push("me/it")
    assert error.value.code == Exit.ENVIRONMENT
    for part in (TOKEN, "tail", "TAIL"):
        assert part not in str(error.value)


def test_a_token_of_two_lines_is_in_no_output_of_the_command(adapter, tmp_path):
    options = ("--to", "peft", "--out", "out", "--push", "me/it", "--base-name", "me/base", "--json")
    done = qlora(tmp_path, adapter, *options, HF_TOKEN=f"{TOKEN}\nabcdefTAIL")
    assert done.returncode == Exit.ENVIRONMENT, done.stderr
    for part in (TOKEN, "TAIL", "Traceback"):
        assert part not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def test_a_quoted_token_in_an_error_is_taken_out_too():
    error = _told(ValueError(f"value {'a' + chr(92) + 'b'!r} and a{chr(92)}b"), Path("x"), "me/it", "a\\b")
    assert error.what == "the hub did not take it: value '***' and ***"


def test_a_base_of_this_machine_is_not_pushed(adapter, tmp_path):
    done = qlora(tmp_path, adapter, "--to", "peft", "--out", "out", "--push", "me/it", HF_TOKEN=TOKEN)
    assert done.returncode == Exit.USAGE
    assert "base is a folder of this machine" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["it", "a/b/c", "/it", "https://hub/me/it", "me/", "me/it now"])
def test_a_repository_needs_a_users_name_and_its_own(name, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match=r"is no repository's name. Write it as USER/REPO"):
        check_push(name)
    assert check_push("me/it") == TOKEN
