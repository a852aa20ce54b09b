"""The command line: parse, call, print. Results on stdout, messages on stderr, one exit code per kind of end."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper

from qlora_cli.cli import runs  # isort: skip (the order of the help)
from qlora_cli.cli import merge  # isort: skip
from qlora_cli.cli import export  # isort: skip
from qlora_cli.cli import chat  # isort: skip
from qlora_cli.cli import report  # isort: skip
from qlora_cli.cli import models  # isort: skip
from qlora_cli.cli.app import app
from qlora_cli.errors import Exit, UserError

__all__ = ["app", "chat", "export", "main", "merge", "models", "report", "runs"]


def main() -> None:
    """The entry point: a user's mistake becomes its message and exit code, a bug of ours keeps its traceback."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name need not be in the terminal's encoding
    try:
        app(prog_name="qlora")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.code)
    except BrokenPipeError:  # who read our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(Exit.FAILED)
    except PermissionError as error:
        print(f"{error.filename}: {error.strerror}. Mend its permissions, or name another place.", file=sys.stderr)
        sys.exit(Exit.FAILED)
    except KeyboardInterrupt:
        print("interrupted; no half-written file is kept", file=sys.stderr)
        sys.exit(Exit.SIGINT)
