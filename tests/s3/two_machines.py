"""A Ray cluster of machines that share no disk: a run in an object store is trained on two of them, and one is lost.

Run as ``python -m tests.s3.two_machines CONFIG RUN FOLDER`` with ``PTAFUSE_FAULT=block@data:train:STEP:FOLDER``, so that
training waits when the checkpoint of a step is committed. Each node of the cluster has an output folder of its own, named
after it, as machines have that keep ``engine.scratch`` on their own disks; the driver's node trains nothing.
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from tests.tiny_run import ptafuse
from train import launch


def train_worker_with_its_own_disk(settings: dict[str, Any]) -> None:
    """What runs in each worker: its node's own folder in the place of the job's."""
    import torch

    from stages.contract.threads import wait_policy

    node = ray.get_runtime_context().get_node_id()[:8]
    job = replace(settings["job"], output=f"{settings['job'].output}-{node}")
    Path(job.output).mkdir(parents=True, exist_ok=True)
    (Path(job.output) / "wait-policy.txt").write_text(f"{sorted(wait_policy(os.environ).items())} {torch.__version__}")
    launch._train_worker({**settings, "job": job})  # the real one: it is replaced in the driver alone


def main(config: str, run: str, folder: str) -> int:
    """Return the exit code of the train command."""
    health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 10}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": health}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address
    launch._train_worker = train_worker_with_its_own_disk
    arguments = ("train", config, "--run", run, "--set", "train.num_workers=2", "--set", "engine.autoscaling=false")
    with ThreadPoolExecutor(1) as pool:  # nodes can be started in the main thread alone
        command = pool.submit(ptafuse, *arguments, check=False)
        while not list(Path(folder).glob("block-*")) and not command.done():
            time.sleep(0.1)
        cluster.remove_node(nodes[1], allow_graceful=False)
        (Path(folder) / "node-killed").touch()
        cluster.add_node(num_cpus=1)
        done = command.result()
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    ray.shutdown()
    cluster.shutdown()
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
