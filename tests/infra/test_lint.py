"""shellcheck and hadolint find nothing."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def tool(name: str) -> str:
    """Return the program, beside this Python or on the path."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: pip install -r requirements-dev.txt")
    return found


@pytest.mark.parametrize("script", ["slurm/ptafuse.sbatch"])
def test_shell_scripts(infra: Path, script: str) -> None:
    done = subprocess.run([tool("shellcheck"), infra / script], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("image", ["cpu", "gpu"])
def test_dockerfiles(infra: Path, image: str) -> None:
    command = [tool("hadolint"), "--no-color", infra / "docker" / f"{image}.Dockerfile"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
