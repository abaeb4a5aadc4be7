"""Fixtures for tests of the preflight: models to spoil, and nothing remembered from earlier tests."""

from pathlib import Path

import pytest

from tests.tiny_models import save_model


@pytest.fixture(autouse=True)
def _nothing_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Provide a sound model with a head of its own."""
    return save_model(tmp_path / "llama")
