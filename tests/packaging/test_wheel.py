"""The wheel carries everything that ships: installed elsewhere, ptafuse works from an empty folder."""

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from pipeline.settings.load import shipped_configs, shipped_sweeps
from tests.tiny_run import REPOSITORY

PACKAGES = ("pipeline", "stages", "train")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide the wheel, built from a copy of what ships: a build leaves files in its folder."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    # The build tools of this environment: nothing is downloaded.
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        folder,
        source,
    ]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of a new environment that has the wheel, and this one's libraries without its ptafuse."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment)
    python = environment / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(command, check=True, capture_output=True)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    # A folder named in a .pth file is searched, but its own .pth files, an editable ptafuse among them, are not read.
    (site_packages / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    where = [python, "-c", "import pipeline; print(pipeline.__file__)"]
    found = subprocess.run(where, check=True, cwd=environment, capture_output=True, text=True)
    assert found.stdout.startswith(str(site_packages)), found.stdout
    return environment / "bin" / "ptafuse"


def run(command: Path, folder: Path, *arguments: str) -> str:
    done = subprocess.run([command, *arguments], check=False, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    shipped = {
        str(path.relative_to(REPOSITORY))
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == shipped


def test_a_shipped_configuration_is_found_by_its_name(installed: Path, tmp_path: Path) -> None:
    config = json.loads(run(installed, tmp_path, "config", "demo"))
    assert config["name"] == "demo"
    assert config["train"]["lambda"] == 0.5


def test_the_paper_s_run_is_planned_without_a_network(installed: Path, tmp_path: Path) -> None:
    plan = json.loads(run(installed, tmp_path, "plan", "llama2_7b", "--run", "run", "--json"))
    assert {step["state"] for step in plan["steps"]} == {"pending"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sweep", [path.stem for path in shipped_sweeps()])
def test_every_shipped_sweep_finds_its_configuration(installed: Path, tmp_path: Path, sweep: str) -> None:
    shown = run(installed, tmp_path, "sweep", sweep, "--check")
    assert f"Sweep {sweep}: " in shown
    assert [path.stem for path in shipped_configs() if f" of {path.stem}, " in " ".join(shown.split())]
