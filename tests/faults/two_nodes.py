"""A Ray cluster on this machine: the node on which a worker waits is killed, another joins, and the stage must finish.

Run as ``python -m tests.faults.two_nodes CONFIG RUN FOLDER`` with a blocking ``PTAFUSE_FAULT``; see ``points``.
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from tests.tiny_run import ptafuse


def main(config: str, run: str, folder: str) -> int:
    """Return the exit code of the stage's command."""
    cluster = start_cluster(period_ms=500, failures=4)
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    return run_and_lose_a_node(cluster, node, Path(folder), "fuse", config, "--run", run)


def start_cluster(*, period_ms: int, failures: int) -> Cluster:
    """Start a cluster whose head computes nothing.

    Args:
        period_ms: time between two questions to each node whether it is alive.
        failures: unanswered questions after which a node is taken for dead.
    """
    health = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": period_ms,
        "health_check_failure_threshold": failures,
    }
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": health}
    return Cluster(initialize_head=True, head_node_args=head)


def run_and_lose_a_node(cluster: Cluster, node: Any, folder: Path, *arguments: str) -> int:
    """Run a command on the cluster; when one of its workers blocks, kill a node and add another.

    Args:
        cluster: with all its nodes; it is shut down at the end.
        node: the one that is lost.
        folder: where the blocked worker leaves a file, and waits for ``node-killed``.
        *arguments: of the command line.

    Returns:
        The exit code of the command.
    """
    os.environ["RAY_ADDRESS"] = cluster.address
    with ThreadPoolExecutor(1) as pool:  # nodes can be started in the main thread alone
        command = pool.submit(ptafuse, *arguments, check=False)
        while not list(folder.glob("block-*")) and not command.done():
            time.sleep(0.1)
        cluster.remove_node(node, allow_graceful=False)
        (folder / "node-killed").touch()
        cluster.add_node(num_cpus=1)  # as a spot market would give another one
        done = command.result()
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    ray.shutdown()
    cluster.shutdown()
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
