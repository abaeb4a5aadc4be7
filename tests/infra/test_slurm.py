"""The Slurm script under a scheduler of stubs: what it starts, how it ends, and that it puts itself back into the queue."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_run import NUM_DOCUMENTS, REPOSITORY, environment, status

STUBS = {
    "scontrol": """
echo "scontrol $*" >> "$STUB_LOG"
[[ $1 == show ]] && echo node1
exit 0
""",
    "srun": """
while [[ $1 == --* ]]; do [[ $1 == --nodelist || $1 == --nodes ]] && shift; shift; done
[[ $1 == hostname ]] && { echo "127.0.0.1 10.0.0.1"; exit; }
exec "$@"
""",
    "ray": """
printf '%q ' ray "$@" >> "$STUB_LOG"; echo >> "$STUB_LOG"
exec sleep "${STUB_SECONDS:-0}"
""",
}


@pytest.fixture
def job(infra: Path, tmp_path: Path) -> tuple[list[str], dict[str, str], Path]:
    """Command, environment and the stubs' log."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (stubs / name).chmod(0o755)
    log = tmp_path / "stubs.log"
    log.touch()
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-1]",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_PER_TASK": "2",
        "SLURM_GPUS_ON_NODE": "0",
        "STUB_LOG": str(log),
    }
    path = os.pathsep.join([str(stubs), str(Path(sys.executable).parent), os.environ["PATH"]])
    return ["bash", str(infra / "slurm" / "ptafuse.sbatch")], environment(PATH=path, **slurm), log


def test_starts_ray_on_every_node_and_the_driver_on_the_first(job: tuple) -> None:
    command, env, log = job
    done = subprocess.run([*command, "my.toml", "/runs/my", "train", "--set", "a=b c"], check=True, env=env)
    assert done.returncode == 0
    started = shlex.split(log.read_text().splitlines()[-1])
    split = started.index("--")
    port = 20000 + os.getpid() % 20000
    assert started[:6] == ["ray", "symmetric-run", "--address", f"127.0.0.1:{port}", "--min-nodes", "1"]
    assert {"--num-cpus=2", "--num-gpus=0"} <= set(started[6:split])
    assert started[split + 1 :] == [
        "ptafuse", "train", "my.toml", "--run", "/runs/my", "--upstream", "--set", "a=b c"
    ]  # fmt: skip


def test_last_stage_is_eval_unless_told(job: tuple) -> None:
    command, env, log = job
    subprocess.run([*command, "my.toml", "s3://b/r"], check=True, env=env)
    assert shlex.split(log.read_text().splitlines()[-1])[-5:] == ["eval", "my.toml", "--run", "s3://b/r", "--upstream"]


def test_exit_code_is_the_drivers(job: tuple, tmp_path: Path) -> None:
    command, env, _ = job
    (tmp_path / "bin" / "ray").write_text("#!/usr/bin/env bash\nexit 3\n")
    assert subprocess.run([*command, "my.toml", "/runs/my"], check=False, env=env).returncode == 3


def test_without_a_run_it_says_how_it_is_used(job: tuple) -> None:
    command, env, _ = job
    done = subprocess.run([*command, "my.toml"], check=False, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: sbatch ptafuse.sbatch CONFIG RUN" in done.stderr


@pytest.mark.parametrize(("number", "why"), [(signal.SIGUSR1, "the time limit is near"), (signal.SIGTERM, "preempted")])
def test_signal_puts_the_job_back_and_ends_the_driver(job: tuple, number: signal.Signals, why: str) -> None:
    command, env, log = job
    env = {**env, "STUB_SECONDS": "600"}
    with subprocess.Popen([*command, "my.toml", "/runs/my"], env=env, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 30
        while "symmetric-run" not in log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.2)  # the script sets its traps and waits
        process.send_signal(number)
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert f"{why}: back into the queue" in said
    assert f"scontrol requeue {os.getpid()}" in log.read_text().splitlines()


@pytest.mark.slow
@pytest.mark.ray
def test_real_ray_computes_a_stage_on_one_node(job: tuple, tiny_config: Path, tmp_path: Path) -> None:
    from ray._private.services import find_gcs_addresses

    if find_gcs_addresses():
        pytest.skip("a Ray runs on this machine, beside which `ray symmetric-run` starts no other")
    command, env, _ = job
    (tmp_path / "bin" / "ray").unlink()
    (tmp_path / "bin" / "ptafuse").write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -m pipeline "$@"\n')
    (tmp_path / "bin" / "ptafuse").chmod(0o755)
    run = tmp_path / "run"
    done = subprocess.run(
        [*command, str(tiny_config), str(run), "shard"],
        check=False,
        cwd=REPOSITORY,
        env=env,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert status(run)["shard"]["num_done"] == NUM_DOCUMENTS // 4
