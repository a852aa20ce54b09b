"""The ids that a model sees before it answers, made by the encoder of training in a process where limits hold.

A chat template is a program from somewhere: see data/worker.py. The process takes pickled ChatSettings, then one JSON
value per line, and gives one JSON object per line.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

from qlora_cli.data.chat import Chat, ChatSettings, make_chat
from qlora_cli.data.confine import confine, cpu_limit
from qlora_cli.data.conversations import Message
from qlora_cli.data.encode import encode_prompt, unspelled
from qlora_cli.data.pool import COMMAND
from qlora_cli.data.rows import whole_text
from qlora_cli.data.worker import LOAD_SECONDS, MEMORY_BYTES, ROW_SECONDS
from qlora_cli.errors import Exit, UserError

WHERE = "the conversation"


class Prompt(NamedTuple):
    """Token ids. lost: the characters that the tokenizer cannot write."""

    ids: list[int]
    lost: list[str]


class Prompts:
    """Makes prompts, for a `with` block: the process is started at once and does not outlive it.

    row_seconds: processor time that one prompt may take.
    """

    def __init__(self, settings: ChatSettings, row_seconds: float = ROW_SECONDS) -> None:
        self.settings, self.row_seconds = settings, row_seconds
        self.child: subprocess.Popen[bytes] | None = self._started()

    def __enter__(self) -> Prompts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.communicate()

    def of(self, prompt: Sequence[Message] | str) -> Prompt:
        """The prompt for messages under the template, or of a verbatim text. Raises UserError where there is none.

        Of seq2seq_lm the text is what the encoder reads.
        """
        self.child = child = self.child or self._started()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(prompt if isinstance(prompt, str) else list(prompt)).encode() + b"\n")
            child.stdin.flush()
            line = child.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            self.child = None
            raise self._death(child)
        answer: dict[str, Any] = json.loads(line)
        if "what" in answer:
            raise UserError(answer["where"], answer["what"], answer["todo"])
        return Prompt(answer["ids"], answer["lost"])

    def _started(self) -> subprocess.Popen[bytes]:
        """A process that has its settings. A group of its own: Ctrl-C is for us alone."""
        command = [sys.executable, "-P", "-c", COMMAND.replace("data.worker", "data.prompts")]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nothing, env=environment, process_group=0)
        data = pickle.dumps((self.settings, self.row_seconds))
        assert child.stdin is not None
        child.stdin.write(struct.pack("<Q", len(data)) + data)
        child.stdin.flush()
        return child

    def _death(self, child: subprocess.Popen[bytes]) -> UserError:
        """Why the process ended."""
        code = child.wait()
        reasons = {
            -signal.SIGPROF: f"takes more than {self.row_seconds:g} s of processor time ({LOAD_SECONDS} to compile)",
            -signal.SIGABRT: f"needs more than {MEMORY_BYTES // 2**20:,} MiB of memory",
            -signal.SIGSEGV: f"needs more than {MEMORY_BYTES // 2**20:,} MiB of memory",
        }
        reason = reasons.get(code, f"ended its process (exit status {code})")
        return UserError(self.settings.called, reason, "use a template that you trust", Exit.FAILED)


def prompt_of(value: Any, chat: Chat) -> Prompt:
    """The prompt for what came as JSON. Raises UserError where training would refuse a row with these texts."""
    if isinstance(value, str):
        texts = [whole_text(value, "the text", WHERE)]
        source = chat.settings.task.name == "seq2seq_lm"
        ids = chat.tokenizer.encode(value).ids if source else encode_prompt(value, chat)
    else:
        texts = [_checked(message, number, chat) for number, message in enumerate(value, 1)]
        ids = encode_prompt(value, chat, WHERE)
        bos = chat.settings.bos
        if bos and ids[: 2 * len(bos)] == bos + bos:
            what = f"{chat.settings.called} begins the conversation with two BOS tokens"
            raise UserError(WHERE, what, "correct the template, or remove the BOS from the text")
    return Prompt(ids, unspelled(sorted(set().union(*texts)), chat.tokenizer, chat.settings.unk_id))


def _checked(message: Message, number: int, chat: Chat) -> str:
    """The message's text. Raises UserError where it holds a control token, as training does."""
    name = f"the text of message {number} ({message['role']})"
    text = whole_text(message["content"], name, WHERE)
    if found := chat.control.search(text):
        what = f"{name} holds the control token {found[0]!r}, which would act as one"
        raise UserError(WHERE, what, "remove it from the text")
    return text


# ── the process ──────────────────────────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    """Answers until its input ends."""
    given, answers = sys.stdin.buffer, sys.stdout.buffer
    settings: ChatSettings
    settings, row_seconds = pickle.loads(given.read(struct.unpack("<Q", given.read(8))[0]))
    confine(40 * len(settings.tokenizer) + MEMORY_BYTES)
    chat: Chat | None = None
    for line in given:
        try:
            if chat is None:
                with cpu_limit(LOAD_SECONDS):
                    chat = make_chat(settings)
            with cpu_limit(row_seconds):
                answer: dict[str, Any] = prompt_of(json.loads(line), chat)._asdict()
        except UserError as error:
            if isinstance(error.__cause__, MemoryError):
                os.abort()
            answer = {"where": error.where, "what": error.what, "todo": error.todo}
        except MemoryError:
            os.abort()  # the parent tells of what
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
