"""The run directory on S3 servers: commits, races, lost answers, throttling, cut uploads."""

import random
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from s3fs import S3FileSystem

from stages.contract import filesystem, store
from stages.contract.filesystem import StoreError, StoreUnreachableError
from stages.contract.store import Store
from tests.s3.conftest import use
from tests.s3.proxy import FAULTS, Fault, FaultyProxy
from tests.s3.servers import BUCKET, S3Server, free_port
from tests.stages.contract.test_store import shard_table

pytestmark = pytest.mark.s3


def strike(method: str, part: str, fault: Fault, times: int = 1):
    """Return a fault for the first ``times`` requests of a method to a path that holds ``part``."""
    left = [times]

    def choose(found_method: str, path: str) -> Fault | None:
        if found_method == method and part in path and left[0]:
            left[0] -= 1
            return fault
        return None

    return choose


def test_table_is_committed_and_read_back(s3_client: S3Server, run_url: str) -> None:
    run = Store(run_url)
    run.check()
    assert run.names("shard") == []
    data = run.write_table("shard/x/data/a.parquet", shard_table())
    assert run.read_table(data, remake="").equals(shard_table())
    assert run.full_url(data.key) == f"{run_url}/shard/x/data/a.parquet"
    assert run.names("shard/x/data") == ["a.parquet"]
    assert Store(run_url).exists(data.key)
    run.delete(data.key)
    run.delete(data.key)
    assert not run.exists(data.key)


def test_second_create_changes_nothing(s3_client: S3Server, run_url: str) -> None:
    run = Store(run_url)
    assert run.create("m.json", b"first")
    assert not run.create("m.json", b"second")
    assert run.create("m.json", b"first"), "what stands there is ours: a repeated request is no lost race"
    assert run.read("m.json") == b"first"


def test_what_another_process_wrote_is_seen_at_once(s3_client: S3Server, run_url: str) -> None:
    one, other = Store(run_url), Store(run_url)
    one.create("manifests/a.json", b"a")
    assert other.names("manifests") == ["a.json"]
    one.create("manifests/b.json", b"b")
    assert other.names("manifests") == ["a.json", "b.json"]


def test_racing_creates_agree_on_what_is_stored(
    s3_client: S3Server, run_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both look before either writes: the store that knows the condition refuses one, the other keeps the last."""
    meet = threading.Barrier(2)
    exists = Store.exists

    def look_together(self: Store, key: str) -> bool:
        found = exists(self, key)
        meet.wait(timeout=30)
        return found

    monkeypatch.setattr(Store, "exists", look_together)
    results: dict[bytes, bool] = {}

    def create(raw: bytes) -> None:
        results[raw] = Store(run_url).create("m.json", raw)

    threads = [threading.Thread(target=create, args=(raw,)) for raw in (b"one", b"two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[Store(run_url).read("m.json")], "whoever wrote what stands knows that it won"
    if s3_client.kind == "moto":
        assert sum(results.values()) == 1


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_waited_out(
    s3_client: S3Server, run_url: str, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    """Each request to a data file and to a manifest is struck twice, whatever its method."""
    if fault == "short-upload" and s3_client.kind == "rclone":
        pytest.skip("rclone checks the body's signature: it refuses half a body by itself")
    seen: dict[tuple[str, str], int] = {}

    def choose(method: str, path: str) -> Fault | None:
        if run_url.rpartition("/")[2] not in path:
            return None
        key = (method, path)
        seen[key] = seen.get(key, 0) + 1
        return fault if seen[key] <= 2 else None

    with FaultyProxy(s3_client.port, choose) as proxy:
        use(proxy.endpoint, monkeypatch)
        run = Store(run_url)
        if fault != "short-upload":  # JSON that was cut would be published; it is refused when it is read
            assert run.create("m.json", b"manifest of this attempt"), "a repeated request is no lost race"
            assert run.read("m.json") == b"manifest of this attempt"
        data = run.write_table("data/a.parquet", shard_table(100))
        assert run.read_table(data, remake="").equals(shard_table(100))
        assert run.names("data") == ["a.parquet"]
        assert {struck for _, _, struck in proxy.struck} == {fault}
    assert len(proxy.struck) >= 4


def test_many_operations_through_random_faults(
    s3_client: S3Server, run_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(7)
    faults = [fault for fault in FAULTS if fault != "short-upload"]
    with FaultyProxy(s3_client.port, lambda *_: chance.choice(faults) if chance.random() < 0.3 else None) as proxy:
        use(proxy.endpoint, monkeypatch)
        run = Store(run_url)
        for index in range(8):
            table = shard_table(index + 1)
            data = run.write_table(f"data/{index}.parquet", table)
            assert run.create(f"manifests/{index}.json", data.sha256.encode())
            assert not run.create(f"manifests/{index}.json", b"another attempt")
            assert run.read_table(data, remake="").equals(table)
        assert len(run.names("manifests")) == 8
    assert len(proxy.struck) > 10


def test_large_file_goes_in_parts_and_survives_a_lost_part(
    s3_client: S3Server, run_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "UPLOAD_PART_BYTES", 5 * 2**20)
    table = pa.table({"noise": np.random.default_rng(1).random(3 * 2**19)})  # 12 MiB that no codec makes smaller
    with FaultyProxy(s3_client.port, strike("PUT", "partNumber=2", "cut-upload")) as proxy:
        use(proxy.endpoint, monkeypatch)
        run = Store(run_url)
        data = run.write_table("data/large.parquet", table)
        assert data.num_bytes > 10 * 2**20
        assert run.read_table(data, remake="").equals(table)
    assert len(proxy.struck) == 1


def test_store_that_stays_away_ends_the_command_with_advice(
    s3_client: S3Server, run_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "RETRY_SECONDS", 1.0)
    with FaultyProxy(s3_client.port, lambda *_: "slow-down") as proxy:
        use(proxy.endpoint, monkeypatch)
        with pytest.raises(StoreUnreachableError, match=rf"no useful answer .*{proxy.endpoint} \(AWS_ENDPOINT_URL\)"):
            Store(run_url).read("m.json")


def test_an_address_where_nothing_listens_is_reported_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    use(f"http://127.0.0.1:{free_port()}", monkeypatch)
    with pytest.raises(
        StoreUnreachableError, match=r"check that http://127.* \(AWS_ENDPOINT_URL\) is right and running"
    ):
        Store(f"s3://{BUCKET}/run").check()


def test_missing_bucket_is_named(s3_client: S3Server) -> None:
    with pytest.raises(StoreError, match=r"there is no bucket 'nothing-here' at http://127"):
        Store("s3://nothing-here/run").check()


def test_missing_credentials_name_what_to_set(s3_client: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    S3FileSystem.clear_instance_cache()  # clients keep the credentials that they began with
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreError, match="no S3 credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        Store(f"s3://{BUCKET}/run").check()


def test_wrong_credentials_are_refused_with_what_is_needed(
    s3_client: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    if s3_client.kind == "moto":
        pytest.skip("moto checks no signature")
    S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match=r"access refused .*check AWS_ACCESS_KEY_ID"):
        Store(f"s3://{BUCKET}/run").check()


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:secret@bucket/run",
        "https://host/f.parquet?X-Amz-Signature=1",
        "abfs://c/f?sig=xyz",
        "https://h/x?token=1",
    ],
)
def test_secret_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match="holds a password, signature or token") as refused:
        Store(url)
    assert not any(secret in str(refused.value) for secret in ("key:secret", "Signature=1", "xyz", "token=1"))


def test_unknown_protocol_is_named() -> None:
    with pytest.raises(StoreError, match=r"nowhere://x cannot be opened: Protocol not known: nowhere"):
        Store("nowhere://x")


def test_temporary_files_are_removed_when_the_upload_fails(
    s3_client: S3Server, run_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(filesystem, "RETRY_SECONDS", 0.5)
    with FaultyProxy(s3_client.port, strike("PUT", "", "drop", times=1000)) as proxy:
        use(proxy.endpoint, monkeypatch)
        with pytest.raises(StoreUnreachableError):
            Store(run_url).write_table("data/a.parquet", shard_table())
    assert list(tmp_path.iterdir()) == []
