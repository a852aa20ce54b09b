"""One conversation with one model: what was said, what is said next, and how it is stored as a training row."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_cli.chat.reply import Reply, Say, Speaker, answer
from qlora_cli.chat.session import Session
from qlora_cli.data.conversations import Message, assistant, system, user
from qlora_cli.errors import UserError


@dataclass
class Dialogue:
    """The conversation with `speaker`. Where there is no chat template each exchange stands alone.

    replies: one for each text that was answered; attempts: how often the model was asked.
    """

    session: Session
    speaker: Speaker
    told: str = ""
    texts: list[str] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    attempts: int = 0
    lost: list[str] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """The conversation as rows in the format `messages` hold it."""
        turns = [system(self.told)] if self.told else []
        for text, reply in zip(self.texts, self.replies, strict=True):
            turns += [user(text), assistant(reply.text)]
        return turns

    def ask(self, text: str, say: Say) -> Reply:
        """The reply to a text, said piece by piece. A text that cannot be answered leaves the conversation as it was.

        `lost` holds the characters of the prompt that the tokenizer cannot write.
        """
        session = self.session
        if not text.strip():
            raise UserError("the text", "is empty", "write what is to be answered")
        if session.has_template:
            prompt = session.prompts.of([*self.messages, user(text)])
        else:
            prompt = session.prompts.of(session.asked(text) if session.asked else text)
        self.lost = prompt.lost
        reply = answer(self.speaker, prompt.ids, session.manner, self.attempts, say)
        self.attempts += 1
        self.texts.append(text)
        self.replies.append(reply)
        return reply

    def again(self, say: Say) -> Reply:
        """Another reply to the last text in place of its reply. Raises UserError where there is none."""
        if not self.texts:
            raise UserError("/regenerate", "nothing was said yet", "write something first")
        text, reply = self.texts.pop(), self.replies.pop()
        try:
            return self.ask(text, say)
        except BaseException:
            self.texts.append(text)
            self.replies.append(reply)
            raise

    def tell(self, text: str) -> None:
        """Sets the system's text, with which the conversation begins anew; an empty one takes it away."""
        if text and not self.session.has_template:
            what = "there is no chat template, so there is no place for a system's text"
            raise UserError("the system's text", what, "write it into the text itself")
        self.told = text
        self.reset()

    def reset(self) -> None:
        """Forgets what was said, but for the system's text."""
        self.texts, self.replies, self.attempts = [], [], 0
        self.speaker.past.forget()

    def rows(self) -> list[dict[str, Any]]:
        """Training rows: the conversation as messages, or where exchanges stand alone one row for each."""
        if self.session.has_template:
            return [{"messages": self.messages}]
        names = ("source", "target") if self.session.task == "seq2seq_lm" else ("prompt", "completion")
        prompt = self.session.asked or str
        both = zip(self.texts, self.replies, strict=True)
        return [dict(zip(names, (prompt(text), reply.text), strict=True)) for text, reply in both]

    def save(self, path: Path) -> None:
        """Writes the rows to a new file. Raises UserError where it is there already, or nothing was said."""
        if not self.texts:
            raise UserError("/save", "nothing was said yet", "write something first")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows())
        try:
            write_new(path.expanduser(), text.encode("utf-8"))
        except FileExistsError:
            raise UserError(path, "is there already, and nothing is overwritten", "name a new file") from None
        except OSError as error:
            raise UserError(path, f"cannot be written: {error.strerror}", "name another file") from error
        except (RuntimeError, ValueError) as error:  # no home of that user; NUL, or half a character, in name or text
            raise UserError(path, f"cannot be written: {error}", "name another file") from error

    def cut(self) -> str:
        """Why the last reply is not a whole one: it did not end with a stop token; "" where it did."""
        reasons = {
            "max_new_tokens": f"after {self.session.manner.decoding.max_new_tokens} tokens; --max-new-tokens sets it",
            "context": "where the model's context ends; /reset begins a new conversation",
            "interrupted": "",
        }
        stopped = self.replies[-1].stopped if self.replies else ""
        return f"the reply was cut {reasons[stopped]}".strip() if stopped in reasons else ""


def write_new(path: Path, content: bytes) -> None:
    """Writes a file that is not there before all of it is. Raises FileExistsError where one is there, and OSError."""
    aside = path.with_name(f".{path.name[:40]}.{os.getpid()}.partial")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(aside, path)  # unlike a rename, never in the place of another
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def as_json(dialogue: Dialogue) -> dict[str, Any]:
    """A conversation with its figures: those of the last reply, and of every one in `replies`."""
    figures = [
        {
            "prompt_tokens": reply.prompt_tokens,
            "generated_tokens": reply.generated_tokens,
            "stopped": reply.stopped,
            "tokens_per_s": round(reply.tokens_per_s, 2),
        }
        for reply in dialogue.replies
    ]
    return {
        "model": dialogue.speaker.name,
        "messages": dialogue.messages,
        "reply": dialogue.replies[-1].text,
        **figures[-1],
        "replies": figures,
    }
