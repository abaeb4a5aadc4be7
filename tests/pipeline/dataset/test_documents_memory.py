"""Planning and reading a dataset holds a shard of it in memory, however large it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

_MEMORY_PROGRAM = """
import re, sys
from pathlib import Path
from pipeline.dataset.documents import dataset_identity, plan_documents, read_documents
from stages.shard.config import DatasetConfig

def memory(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

dataset = DatasetConfig(path=sys.argv[1])
read_documents(dataset, plan_documents(dataset.model_copy(update={"max_documents": 500}), 500)[0])
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
dataset_identity(dataset)
plan = plan_documents(dataset, 500)
for part in plan:
    read_documents(dataset, part)
print(len(plan), memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_memory_does_not_grow_with_the_dataset(tmp_path: Path, suffix: str) -> None:
    """Kilobytes at the peak beyond a first shard: planning and reading every shard of 20 MB and of 200 MB."""
    found = {}
    for megabytes in (20, 200):
        path = tmp_path / f"{megabytes}.{suffix}"
        _write_large(path, megabytes)
        done = subprocess.run(
            [sys.executable, "-c", _MEMORY_PROGRAM, str(path)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        )
        num_shards, found[megabytes] = map(int, done.stdout.split())
        assert num_shards == megabytes // 2
    assert found[200] < found[20] + 30_000


def _write_large(path: Path, megabytes: int) -> None:
    """Documents of 4 kB."""
    text = "x" * 4000
    if path.suffix == ".jsonl":
        line = json.dumps({"text": text}).encode() + b"\n"
        with path.open("wb") as file:
            for _ in range(megabytes):
                file.write(line * 250)
        return
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(path, schema, use_dictionary=False, compression="none") as writer:
        for _ in range(megabytes):
            writer.write_table(pa.table({"text": [text] * 250}, schema=schema))
