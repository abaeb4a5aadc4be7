"""Fixtures shared by all tests."""

import os
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "untimed",  # a loaded machine is slow, which is no fault of what is tested
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("untimed")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide the TOML of a run with tiny models, beside its models and corpus."""
    from tests.tiny_run import save_inputs

    return save_inputs(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def undisturbed_run(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide a finished run of all sharded stages, in one process: what every disturbed run must equal."""
    from tests.tiny_run import ptafuse

    run = tmp_path_factory.mktemp("undisturbed") / "run"
    ptafuse("eval", str(tiny_config), "--run", str(run), "--local", "--upstream")
    return run


@pytest.fixture(scope="session")
def chat_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide the TOML of a run on conversations with tiny models, beside its models and conversations."""
    from tests.chat_run import save_chat_inputs

    return save_chat_inputs(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def chat_run(chat_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide a finished run on conversations, in one process."""
    from tests.tiny_run import ptafuse

    run = tmp_path_factory.mktemp("chat-run") / "run"
    ptafuse("eval", str(chat_config), "--run", str(run), "--local", "--upstream")
    return run
