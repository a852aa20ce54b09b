"""Fixtures of the tests of fused layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qlora_cli.model.base import Base
from tests.model.tiny_adapters import built, counted


@pytest.fixture
def build(make_recipe) -> Callable[..., tuple[Base, Any]]:
    """Makes a quantised base and its adapter; keyword arguments are of the recipe's adapter."""

    def made(quantization: Any = None, model: Any = None, **adapter: Any) -> tuple[Base, Any]:
        return built(make_recipe, quantization or {}, model or {}, adapter)

    return made


@pytest.fixture
def calls(monkeypatch) -> list[float]:
    return counted(monkeypatch)
