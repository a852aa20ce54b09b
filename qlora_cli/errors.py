"""The user's mistakes, each with its place, its cause and its remedy; a bug of ours stays a traceback."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of every command."""

    DONE = 0
    FAILED = 1  # the run failed: non-finite loss, disk, memory
    USAGE = 2  # usage, recipe or data
    REFUSED = 3  # refused for safety
    ENVIRONMENT = 4  # a package or a device is missing
    IN_USE = 5  # another process works in the run folder
    SIGINT = 130  # interrupted after a verified save
    SIGTERM = 143


class UserError(Exception):
    """Something the user can mend: printed as `where: what. todo`, without a traceback.

    where: the place, as file:line:column, a folder or a recipe key.
    what:  the cause, with the value seen.
    todo:  what to do about it, one sentence without its full stop; its first word gets a capital.
    """

    def __init__(self, where: object, what: str, todo: str, code: Exit = Exit.USAGE):
        self.where, self.what, self.todo, self.code = str(where), what, todo, code
        first = todo.split(maxsplit=1)[0]
        todo = todo[0].upper() + todo[1:] if first.isalpha() else todo  # a key such as data.train stays as it is
        super().__init__(f"{self.where}: {what.rstrip('.')}. {todo.rstrip('.')}.")


class UserErrors(UserError):
    """Several mistakes found in one pass: each is printed on its own line."""

    def __init__(self, problems: Sequence[UserError]):
        assert problems, "an error needs a problem"
        self.problems = tuple(problems)
        first = problems[0]
        super().__init__(first.where, first.what, first.todo, first.code)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)
