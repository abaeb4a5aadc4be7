"""A Ray cluster on this machine: the node on which a worker waits is killed, another joins, and the stage must finish.

Run as ``python -m tests.faults.two_nodes CONFIG RUN FOLDER`` with a blocking ``PTAFUSE_FAULT``; see ``points``.
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from tests.tiny_run import ptafuse


def main(config: str, run: str, folder: str) -> int:
    """Returns the exit code of the stage's command."""
    health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": health}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address
    with ThreadPoolExecutor(1) as pool:  # nodes can be started in the main thread alone
        command = pool.submit(ptafuse, "fuse", config, "--run", run, check=False)
        while not list(Path(folder).glob("block-*")) and not command.done():
            time.sleep(0.1)
        cluster.remove_node(node, allow_graceful=False)
        (Path(folder) / "node-killed").touch()
        cluster.add_node(num_cpus=1)  # as a spot market would give another one
        done = command.result()
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    ray.shutdown()
    cluster.shutdown()
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
