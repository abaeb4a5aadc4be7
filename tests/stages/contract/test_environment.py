"""What of the driver's environment reaches the workers, and that its secrets are shown nowhere."""

import json
import os
import pickle
import subprocess
import sys

import pytest

from stages.contract.environment import DriverEnvironment

SECRETS = {
    "HF_TOKEN": "hf_secret",
    "AWS_SECRET_ACCESS_KEY": "aws/secret",
    "AWS_SESSION_TOKEN": "session-secret",
    "PTAFUSE_SERVER_KEY_QWEN": "key-secret",
}
OTHERS = {"HF_HUB_OFFLINE": "1", "AWS_ENDPOINT_URL": "http://minio:9000", "PTAFUSE_SERVER_URL": "http://gpu-7:8000"}
OF_ONE_MACHINE = {
    "HF_HOME": "/home/me/hf",
    "AWS_PROFILE": "me",
    "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token",
    "PATH": "/bin",
}


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> DriverEnvironment:
    for name, value in (SECRETS | OTHERS | OF_ONE_MACHINE).items():
        monkeypatch.setenv(name, value)
    return DriverEnvironment.here()


def test_workers_get_credentials_and_switches_and_nothing_of_one_machine(
    driver: DriverEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived = pickle.loads(pickle.dumps(driver))
    for name in SECRETS | OTHERS | OF_ONE_MACHINE:
        monkeypatch.setenv(name, "the worker's own")
    arrived.apply()
    assert {name: os.environ[name] for name in SECRETS | OTHERS} == SECRETS | OTHERS
    assert {os.environ[name] for name in OF_ONE_MACHINE} == {"the worker's own"}


def test_secrets_are_not_printed(driver: DriverEnvironment) -> None:
    shown = f"{driver} {driver!r} {[driver]} {json.dumps({'environment': driver}, default=str)}"
    assert "HF_TOKEN" in shown
    assert not any(secret in shown for secret in SECRETS.values())


def test_ray_train_records_no_secret_of_a_job(driver: DriverEnvironment) -> None:
    """Its state keeps the settings of a training loop, for the dashboard and its exports."""
    from ray.train.v2._internal.state.schema import _to_json_serializable_value

    kept = json.dumps(_to_json_serializable_value({"environment": driver}))
    assert not any(secret in kept for secret in SECRETS.values())


def test_a_worker_s_modules_do_not_read_the_hub_s_switches_before_they_are_set() -> None:
    """``huggingface_hub`` reads ``HF_HUB_OFFLINE`` when it is imported."""
    code = """
import sys
import pipeline.engine.ray_runner, train.launch
print([name for name in ("huggingface_hub", "transformers", "datasets") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
