"""Every test of the data prepares into a cache of its own."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where prepared rows are kept in this test."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/prepared"
