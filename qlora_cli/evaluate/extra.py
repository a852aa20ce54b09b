"""The libraries of the extra `eval`, loaded where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from qlora_cli.errors import Exit, UserError


def library(module: str) -> Any:
    """The module, imported. Raises UserError, with Exit.ENVIRONMENT, where its package is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        what = f"{module.partition('.')[0]} is not installed"
        raise UserError("evaluation", what, "run `pip install 'qlora[eval]'`", Exit.ENVIRONMENT) from None
