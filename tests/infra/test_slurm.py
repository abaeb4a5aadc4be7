"""The Slurm script under a scheduler of stubs: what it starts, how it ends, and that it puts itself back into the queue."""

import contextlib
import os
import re
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
printf '%q ' srun "$@" >> "$STUB_LOG"; echo >> "$STUB_LOG"
while [[ $1 == --* ]]; do [[ $1 == --nodelist || $1 == --nodes ]] && shift; shift; done
[[ $1 == hostname ]] && { echo "127.0.0.1 10.0.0.1"; exit; }
exec "$@"
""",
    # As `ray symmetric-run` does: the driver is a child, and a signal to this process ends it and the driver's workers.
    "ray": """
printf '%q ' ray "$@" >> "$STUB_LOG"; echo >> "$STUB_LOG"
trap 'echo "ray was killed" >> "$STUB_LOG"; exit 143' TERM
while [[ $1 != -- ]]; do shift; done
shift
"$@" &
wait $!
""",
    # A driver that trains: on TERM it takes a moment to write its checkpoint.
    "ptafuse": """
trap 'sleep "${STUB_CHECKPOINT_SECONDS:-0}"; echo "COMMITTED" >> "$STUB_LOG"; exit 1' TERM
echo "driver $$ runs" >> "$STUB_LOG"
for ((i = 0; i < ${STUB_SECONDS:-0} * 10; i++)); do sleep 0.1; done
exit "${STUB_EXIT:-0}"
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


def ray_command(log: Path) -> list[str]:
    """Return the words of the one ``ray`` command."""
    [line] = [line for line in log.read_text().splitlines() if line.startswith("ray ")]
    return shlex.split(line)


def test_starts_ray_on_every_node_and_the_driver_on_the_first(job: tuple) -> None:
    command, env, log = job
    done = subprocess.run([*command, "my.toml", "/runs/my", "train", "--set", "a=b c"], check=True, env=env)
    assert done.returncode == 0
    started = ray_command(log)
    split = started.index("--")
    port = 20000 + os.getpid() % 20000
    assert started[:6] == ["ray", "symmetric-run", "--address", f"127.0.0.1:{port}", "--min-nodes", "1"]
    assert {"--num-cpus=2", "--num-gpus=0"} <= set(started[6:split])
    assert started[split + 1 : split + 3] == ["bash", "-c"], "the driver's process id is written down"
    driver = started[started.index("ptafuse", split) :]
    assert driver == [
        "ptafuse", "train", "my.toml", "--run", "/runs/my", "--upstream", "--set", "engine.autoscaling=false",
        "--set", "a=b c",
    ]  # fmt: skip


def test_the_last_stage_is_eval_by_default(job: tuple) -> None:
    command, env, log = job
    subprocess.run([*command, "my.toml", "s3://b/r"], check=True, env=env)
    started = ray_command(log)
    driver = started[started.index("ptafuse") :]
    assert driver[1:6] == ["eval", "my.toml", "--run", "s3://b/r", "--upstream"]


def test_a_node_has_the_cpus_that_its_gpus_need_and_srun_passes_them_on(job: tuple, infra: Path) -> None:
    """8 CPUs for each training process; sbatch's --cpus-per-task is not inherited by srun."""
    from pipeline.settings.load import load_config

    command, env, log = job
    options = dict(
        re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", (infra / "slurm" / "ptafuse.sbatch").read_text(), re.MULTILINE)
    )
    config = load_config("llama2_7b")
    per_gpu = max(config.train.cpus_per_worker, config.logits.cpus_per_worker)
    assert int(options["cpus-per-task"]) >= int(options["gpus-per-node"]) * per_gpu
    assert {"exclusive": "", "mem": "0"}.items() <= options.items()
    subprocess.run([*command, "my.toml", "/runs/my"], check=True, env=env)
    [step] = [line for line in log.read_text().splitlines() if line.startswith("srun") and "symmetric-run" in line]
    assert "--cpus-per-task=2" in shlex.split(step)


def test_exit_code_is_the_drivers(job: tuple, tmp_path: Path) -> None:
    command, env, _ = job
    (tmp_path / "bin" / "ray").write_text("#!/usr/bin/env bash\nexit 3\n")
    assert subprocess.run([*command, "my.toml", "/runs/my"], check=False, env=env).returncode == 3


def test_without_a_run_the_command_shows_its_usage(job: tuple) -> None:
    command, env, _ = job
    done = subprocess.run([*command, "my.toml"], check=False, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: sbatch ptafuse.sbatch CONFIG RUN" in done.stderr


def signalled(
    job: tuple[list[str], dict[str, str], Path], number: signal.Signals, **settings: str
) -> tuple[subprocess.Popen[str], str, list[str]]:
    """Run a job, signal its batch script when the driver runs; returns the process, what it said and the stubs' log."""
    command, env, log = job
    env = {**env, "STUB_SECONDS": "600", **settings}
    with subprocess.Popen([*command, "my.toml", "/runs/my"], env=env, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 30
        try:
            while not re.search(r"^driver \d+ runs$", log.read_text(), re.MULTILINE):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(number)
            said, _ = process.communicate(timeout=60)
        finally:
            for driver in re.findall(r"^driver (\d+) runs$", log.read_text(), re.MULTILINE):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(driver), signal.SIGKILL)
            process.kill()
    return process, said, log.read_text().splitlines()


@pytest.mark.parametrize(("number", "why"), [(signal.SIGUSR1, "the time limit is near"), (signal.SIGTERM, "preempted")])
def test_signal_stops_the_driver_waits_for_its_checkpoint_and_then_requeues(
    job: tuple, number: signal.Signals, why: str
) -> None:
    process, said, lines = signalled(job, number, STUB_CHECKPOINT_SECONDS="2")
    assert process.returncode == 0
    assert f"{why}: back into the queue" in said
    requeued = lines.index(f"scontrol requeue {os.getpid()}")
    assert lines.index("COMMITTED") < requeued, "a requeue kills the job at once"
    assert "ray was killed" not in lines


def test_a_driver_that_does_not_stop_in_time_is_left_behind(job: tuple) -> None:
    process, said, lines = signalled(job, signal.SIGUSR1, STUB_CHECKPOINT_SECONDS="10", PTAFUSE_GRACE_SECONDS="2")
    assert process.returncode == 0
    assert "has not stopped within 2 s" in said
    requeued = lines.index(f"scontrol requeue {os.getpid()}")
    assert "COMMITTED" not in lines[:requeued]
    assert "ray was killed" in lines[requeued:], "as Slurm would"


def test_a_command_that_ends_well_after_the_signal_is_not_requeued(job: tuple, tmp_path: Path) -> None:
    (tmp_path / "bin" / "ptafuse").write_text(
        '#!/usr/bin/env bash\ntrap \'exit 0\' TERM\necho "driver $$ runs" >> "$STUB_LOG"\nwhile sleep 0.1; do :; done\n'
    )
    (tmp_path / "bin" / "ray").write_text(f"#!/usr/bin/env bash\n{STUBS['ray']}exit 0\n")
    process, said, lines = signalled(job, signal.SIGUSR1)
    assert process.returncode == 0
    assert "came to its end meanwhile" in said
    assert not any(line.startswith("scontrol requeue") for line in lines)


@pytest.mark.slow
@pytest.mark.ray
def test_real_ray_computes_a_stage_on_one_node(job: tuple, tiny_config: Path, tmp_path: Path) -> None:
    from ray._private.services import find_gcs_addresses

    if find_gcs_addresses():
        pytest.skip("a Ray runs on this machine, beside which `ray symmetric-run` starts no other")
    command, env, _ = job
    (tmp_path / "bin" / "ray").unlink()
    (tmp_path / "bin" / "ptafuse").write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -m pipeline "$@"\n')
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
