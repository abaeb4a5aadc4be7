"""``ptafuse check`` says what it has seen; what it finds is in test_bad_input.py."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.tiny_run import ptafuse


def test_a_model_of_the_hub_that_is_not_in_the_cache_is_not_called_sound(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    local = f'path = "{tiny_config.parent}/llama"'
    assert local in tiny_config.read_text()
    config = tmp_path / "hub.toml"
    config.write_text(tiny_config.read_text().replace(local, 'hub = "some/llama"\nrevision = "main"'))
    assert ptafuse("check", str(config)).stdout.splitlines()[:2] == [
        "llama (some/llama@main): it is not in the local cache of the hub, so it is checked after its first download",
        f"neox ({tiny_config.parent}/neox): nothing wrong was found",
    ]


def test_sound_models_are_called_so(tiny_config: Path) -> None:
    folder = tiny_config.parent
    assert ptafuse("check", str(tiny_config)).stdout.splitlines()[:2] == [
        f"llama ({folder}/llama): nothing wrong was found",
        f"neox ({folder}/neox): nothing wrong was found",
    ]
