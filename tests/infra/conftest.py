"""The files of infra/."""

from pathlib import Path

import pytest

from tests.tiny_run import REPOSITORY


@pytest.fixture(scope="session")
def infra() -> Path:
    return REPOSITORY / "infra"
