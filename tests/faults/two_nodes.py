"""A Ray cluster of two nodes on this machine: the one on which a worker waits is killed, and the stage must finish.

Run as ``python -m tests.faults.two_nodes CONFIG RUN FOLDER`` with a blocking ``PTAFUSE_FAULT``; see ``points``.
"""

import os
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from tests.tiny_run import ptafuse


def main(config: str, run: str, folder: str) -> int:
    """Returns the exit code of the stage's command."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    workers = [cluster.add_node(num_cpus=1)]
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address
    killer = threading.Thread(target=_kill_a_node, args=(cluster, workers, Path(folder)), daemon=True)
    killer.start()
    done = ptafuse("fuse", config, "--run", run, "--set", "fuse.num_workers=2", check=False)
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    ray.shutdown()
    cluster.shutdown()
    return done.returncode


def _kill_a_node(cluster: Cluster, nodes: list, folder: Path) -> None:
    while not list(folder.glob("block-*")):
        time.sleep(0.1)
    cluster.remove_node(nodes[0], allow_graceful=False)
    cluster.add_node(num_cpus=1)  # as a spot market would give another one
    sys.stdout.write("killed the node\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
