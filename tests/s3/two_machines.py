"""A Ray cluster of machines that share no disk: a run in an object store is trained on two of them, and one is lost.

Run as ``python -m tests.s3.two_machines CONFIG RUN FOLDER`` with ``PTAFUSE_FAULT=block@data:train:STEP:FOLDER``, so that
training waits when the checkpoint of a step is committed. Each node of the cluster has an output folder of its own, named
after it, as machines have that keep ``engine.scratch`` on their own disks; the driver's node trains nothing.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from tests.faults.two_nodes import run_and_lose_a_node, start_cluster
from train import launch


def train_worker_with_its_own_disk(settings: dict[str, Any]) -> None:
    """Train in a worker, into its node's own folder instead of the job's."""
    import torch

    from stages.contract.threads import wait_policy

    node = ray.get_runtime_context().get_node_id()[:8]
    job = replace(settings["job"], output=f"{settings['job'].output}-{node}")
    Path(job.output).mkdir(parents=True, exist_ok=True)
    (Path(job.output) / "wait-policy.txt").write_text(f"{sorted(wait_policy(os.environ).items())} {torch.__version__}")
    launch._train_worker({**settings, "job": job})  # the real one: it is replaced in the driver alone


def main(config: str, run: str, folder: str) -> int:
    """Return the exit code of the train command."""
    cluster = start_cluster(period_ms=1000, failures=10)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    launch._train_worker = train_worker_with_its_own_disk
    settings = ("--set", "train.num_workers=2", "--set", "engine.autoscaling=false")
    return run_and_lose_a_node(cluster, nodes[1], Path(folder), "train", config, "--run", run, *settings)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
