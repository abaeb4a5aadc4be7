"""How OpenMP's threads wait: asleep, unless the user says otherwise, and in every process that computes."""

import os
import subprocess
import sys

import pytest

from stages.contract.threads import DEFAULTS, USER_VARIABLES, let_idle_threads_sleep, wait_policy
from tests.tiny_run import REPOSITORY

_SHOW = """
import os, sys
import {module}
assert "torch" not in sys.modules or {may_load_torch}
print(*(f"{{name}}={{os.environ.get(name)}}" for name in {names}))
"""


def started(module: str, *, may_load_torch: bool = True, **variables: str) -> dict[str, str]:
    """Return the variables of a new process that has imported a module."""
    environment = {name: value for name, value in os.environ.items() if name not in USER_VARIABLES}
    program = _SHOW.format(module=module, may_load_torch=may_load_torch, names=USER_VARIABLES)
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        cwd=REPOSITORY,
        env={**environment, "PYTHONPATH": str(REPOSITORY), **variables},
        stdout=subprocess.PIPE,
        text=True,
    )
    pairs = (pair.split("=", 1) for pair in done.stdout.split())
    return {name: value for name, value in pairs if value != "None"}


@pytest.mark.parametrize("package", ["stages", "train", "pipeline"])
def test_every_package_sets_the_wait_policy_before_torch_is_loaded(package: str) -> None:
    assert started(package, may_load_torch=False) == DEFAULTS


@pytest.mark.parametrize("setting", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME": "200"}])
def test_a_user_s_setting_is_kept_and_not_mixed_with_ours(setting: dict[str, str]) -> None:
    assert started("pipeline.cli.main", **setting) == setting


def test_torch_s_openmp_obeys_the_variables() -> None:
    """It says so itself: OMP_DISPLAY_ENV makes the library print what it has read when it is loaded."""
    environment = {name: value for name, value in os.environ.items() if name not in USER_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", "import train, torch; torch.set_num_threads(2); torch.ones(10**6).sum()"],
        check=True,
        cwd=REPOSITORY,
        env={**environment, "PYTHONPATH": str(REPOSITORY), "OMP_DISPLAY_ENV": "TRUE"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr.replace("[host] ", "")


def test_the_policy_of_the_command_travels_to_the_workers() -> None:
    environment = {"PATH": "/bin"}
    let_idle_threads_sleep(environment)
    assert wait_policy(environment) == DEFAULTS
    assert wait_policy({"OMP_WAIT_POLICY": "ACTIVE", "PATH": "/bin"}) == {"OMP_WAIT_POLICY": "ACTIVE"}
