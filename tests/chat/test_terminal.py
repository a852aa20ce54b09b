"""`qlora chat` on a terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
import time
from contextlib import suppress

from qlora_cli.chat.dialogue import Dialogue
from tests.chat.conftest import session_of
from tests.tiny import write_tiny_model


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, *arguments: str, columns: int = 80) -> None:
        self.seen, self.at = "", 0
        self.child, self.screen = pty.fork()
        if self.child == 0:
            os.environ.update(TERM="xterm", COLUMNS=str(columns), LINES="40")
            os.execv(sys.executable, [sys.executable, "-m", "qlora_cli", "chat", *arguments])

    def read(self, awaited: str) -> None:
        """Reads what is there. Fails where the command has ended."""
        try:
            self.seen += os.read(self.screen, 4096).decode(errors="replace")
        except OSError:
            raise AssertionError(f"it ended without {awaited!r}: {self.seen[self.at :]!r}") from None

    def until(self, words: str, seconds: float = 60) -> str:
        """Reads until the words are there, behind those that were waited for last; what was read."""
        ends = time.monotonic() + seconds
        while (found := self.seen.find(words, self.at)) < 0:
            assert time.monotonic() < ends, f"no {words!r} in {self.seen[self.at :]!r}"
            if select.select([self.screen], [], [], 0.1)[0]:
                self.read(words)
        begun, self.at = self.at, found + len(words)
        return self.seen[begun : self.at]

    def more(self, characters: int) -> None:
        """Reads so many characters behind those that were waited for last."""
        ends = time.monotonic() + 60
        while len(self.seen) < self.at + characters:
            assert time.monotonic() < ends, f"nothing but {self.seen[self.at :]!r}"
            if select.select([self.screen], [], [], 0.1)[0]:
                self.read("more")
        self.at += characters

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def ended(self) -> int:
        """Its exit code, once it has ended; it has two minutes."""
        ends = time.monotonic() + 120
        while not (gone := os.waitpid(self.child, os.WNOHANG))[0]:
            if select.select([self.screen], [], [], 0.1)[0]:
                with suppress(OSError):  # nothing comes any more
                    self.seen += os.read(self.screen, 4096).decode(errors="replace")
            if time.monotonic() > ends:
                os.kill(self.child, signal.SIGKILL)
        os.close(self.screen)
        return os.waitstatus_to_exitcode(gone[1])


def test_ctrl_c_ends_a_reply_and_keeps_the_session_and_at_the_prompt_ends_it(tmp_path):
    model = write_tiny_model(tmp_path / "model", max_position_embeddings=1_000_000)
    terminal = Terminal(str(model), "--max-new-tokens", "900000")  # its reply to this goes round for ever
    terminal.until("/help lists the commands.")  # what stands before may hold a "> " too
    terminal.until("> ")
    terminal.type("say 1\n")
    terminal.until("say 1\r\n")
    terminal.more(20)
    os.kill(terminal.child, signal.SIGINT)
    terminal.until("note     the reply was cut\r\n")
    terminal.until("> ")
    terminal.type("/nonsense\n")
    terminal.until("/nonsense: no such command. See /help; two slashes begin a text with one.")
    terminal.until("> ")
    time.sleep(0.5)  # readline does not see a signal between its prompt and its waiting
    terminal.type("\x03")
    assert terminal.ended() == 130


def test_a_wide_terminal_shows_both_replies_side_by_side_and_ctrl_d_ends(run):
    terminal = Terminal(str(run), "--baseline", columns=120)
    terminal.until("/help lists the commands.")  # what stands before may hold a "> " too
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
