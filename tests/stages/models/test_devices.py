"""Where a model runs, and what memory it takes there."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stages.models import devices
from stages.models.devices import peak_memory_bytes, peak_resident_bytes

_MIB = 2**20
_CHILD = "from stages.models.devices import peak_resident_bytes; print(peak_resident_bytes())"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="elsewhere a child's peak begins at its parent's")
def test_peak_memory_is_the_process_s_own_and_not_that_of_its_parent() -> None:
    ballast = bytearray(1000 * _MIB)
    ballast[::4096] = bytes(len(ballast) // 4096)  # every page is held
    assert peak_resident_bytes() >= len(ballast)
    child = subprocess.run([sys.executable, "-c", _CHILD], check=True, capture_output=True, text=True)
    assert 10 * _MIB < int(child.stdout) < 900 * _MIB
    del ballast
    assert peak_memory_bytes(torch.device("cpu")) >= 1000 * _MIB, "the peak stays"


@pytest.mark.parametrize("told", [None, "Name:\tpython\nVmRSS:\t  4096 kB\n"])
def test_peak_memory_is_known_where_the_kernel_does_not_tell_it(tmp_path: Path, monkeypatch, told: str | None) -> None:
    status = tmp_path / "status"
    if told is not None:
        status.write_text(told)
    monkeypatch.setattr(devices, "_STATUS", status)
    assert peak_resident_bytes() > 10 * _MIB
