"""What was exported, to a hub repository. The token is read from the environment, and written nowhere."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from qlora_cli.errors import Exit, UserError

TOKEN = "HF_TOKEN"
USABLE = re.compile(r"[!-~]+")
"""What a header can carry: libraries quote any other token in their messages."""

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def check_push(repository: str) -> str:
    """The token. Raises UserError for a name that is no USER/REPO, and (exit 4) where no usable token is set."""
    if not REPOSITORY.fullmatch(repository):
        raise UserError("--push", f"{repository!r} is no repository's name", "write it as USER/REPO")
    token = os.environ.get(TOKEN, "").strip()
    if not token:
        what = f"{TOKEN} is not set in the environment, and nothing else is read for a token"
        raise UserError("--push", what, f"run `export {TOKEN}=...` with a token that may write", Exit.ENVIRONMENT)
    if not USABLE.fullmatch(token):
        what = f"{TOKEN} holds spaces, line breaks or letters beyond ASCII, which no token has"
        raise UserError("--push", what, "copy the token again, alone", Exit.ENVIRONMENT)
    return token


def push(path: Path, repository: str, private: bool, token: str) -> dict[str, Any]:
    """Uploads a file or a folder's files to a model repository, which is made where it is missing.

    Returns its name and the commit's address. Raises UserError with the reason in a line, never with the token.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(token=token, library_name="qlora")
    message = "Exported by qlora"
    failures: tuple[type[Exception], ...] = (HTTPError, OSError, ValueError, RuntimeError)  # the last is hf_xet's
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if path.is_dir():
            commit = api.upload_folder(repo_id=repository, folder_path=path, commit_message=message)
        else:
            commit = api.upload_file(
                path_or_fileobj=path, path_in_repo=path.name, repo_id=repository, commit_message=message
            )
    except failures as error:
        raise _told(error, path, repository, token) from None  # its traceback holds the request with the token
    return {"repository": repository, "address": str(commit.commit_url)}


def _told(error: Exception, path: Path, repository: str, token: str) -> UserError:
    """The reason in one line, without the token."""
    text = str(error).replace(token, "***").replace(repr(token)[1:-1], "***")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = " ".join(lines)[:300] or type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        todo = f"set {TOKEN} to a token that may write to {repository}; what was exported is whole in {path}"
        return UserError(f"--push {repository}", f"the hub does not take the token ({reason})", todo, Exit.ENVIRONMENT)
    todo = f"what was exported is whole in {path}: run `hf upload {repository} {path}` when the hub answers"
    return UserError(f"--push {repository}", f"the hub did not take it: {reason}", todo, Exit.FAILED)
