"""Where a model runs, and what memory it takes there."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stages.models import devices
from stages.models.devices import (
    attention_choices,
    flash_attention_obstacle,
    peak_memory_bytes,
    peak_resident_bytes,
    require_cuda,
    resolve_device,
)

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
def test_peak_memory_is_known_if_the_kernel_does_not_report_it(tmp_path: Path, monkeypatch, told: str | None) -> None:
    status = tmp_path / "status"
    if told is not None:
        status.write_text(told)
    monkeypatch.setattr(devices, "_STATUS", status)
    assert peak_resident_bytes() > 10 * _MIB


OLD_DRIVER = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version: gcc 12\n"
)
OPEN_DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22)\n"


@pytest.fixture
def cuda_build(monkeypatch, tmp_path: Path) -> Path:
    """Provide a torch for CUDA 13.0 that sees no GPU; returns where the driver's version is read."""
    driver = tmp_path / "version"
    monkeypatch.setattr(devices, "_DRIVER", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return driver


def test_a_reserved_gpu_whose_driver_is_too_old_is_an_error_that_names_both_versions(cuda_build: Path) -> None:
    cuda_build.write_text(OLD_DRIVER)
    with pytest.raises(
        ValueError, match=r"logits/mpt has a GPU reserved on .*, and torch sees no GPU there: "
    ) as refused:
        require_cuda("logits/mpt")
    assert "its NVIDIA driver is 535.129.03, and torch" in str(refused.value)
    assert "for CUDA 13.0 needs 580 or newer; update the driver" in str(refused.value)


def test_a_driver_that_is_new_enough_is_not_reported_as_the_cause(cuda_build: Path, monkeypatch) -> None:
    def broken() -> None:
        raise RuntimeError("CUDA driver initialization failed, you might not have a CUDA gpu.")

    cuda_build.write_text(OPEN_DRIVER)
    monkeypatch.setattr(torch.cuda, "init", broken)
    with pytest.raises(
        ValueError, match=r"NVIDIA driver 580\.65\.06, torch for CUDA 13\.0: CUDA driver initialization failed"
    ):
        require_cuda("train")


def test_other_causes_of_a_missing_gpu_are_distinguished(cuda_build: Path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="there is no NVIDIA driver"):
        require_cuda("train")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES = '' hides every GPU"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match="is a build without CUDA"):
        require_cuda("train")


def test_a_gpu_that_torch_sees_is_enough(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert require_cuda("train") is None


@pytest.fixture
def flash_attn(monkeypatch, tmp_path: Path):
    """Installs a package flash_attn with the given code."""

    def install(code: str) -> None:
        (tmp_path / "flash_attn.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
        flash_attention_obstacle.cache_clear()

    yield install
    sys.modules.pop("flash_attn", None)
    flash_attention_obstacle.cache_clear()


def test_flash_attention_that_works_is_used(flash_attn) -> None:
    flash_attn("def flash_attn_func(q, k, v, causal): return q")
    assert flash_attention_obstacle(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('undefined symbol: _ZN3c105ErrorC2E')", "ImportError: undefined symbol"),
        ("raise OSError('libcudart.so.12: cannot open shared object file')", "OSError: libcudart"),
        (
            "def flash_attn_func(*_, causal): raise RuntimeError('no kernel image is available')",
            "RuntimeError: no kernel",
        ),
    ],
)
def test_broken_flash_attention_gives_way_to_sdpa_with_one_message(
    flash_attn, monkeypatch, caplog, code, reason
) -> None:
    flash_attn(code)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: zeros(*size, **{**options, "device": "cpu"}))
    for _ in range(3):
        assert attention_choices("auto", torch.device("cuda"), half_precision=True) == ("sdpa", "eager")
    assert caplog.text.count("FlashAttention 2 is not used: it is installed and broken") == 1
    assert reason in caplog.text


def test_missing_flash_attention_gives_way_to_sdpa_with_one_message(caplog) -> None:
    flash_attention_obstacle.cache_clear()
    for _ in range(2):
        assert attention_choices("auto", torch.device("cuda"), half_precision=True) == ("sdpa", "eager")
    assert caplog.text.count("it is not installed") == 1
    assert attention_choices("flash_attention_2", torch.device("cuda"), half_precision=True) == ("flash_attention_2",)
    flash_attention_obstacle.cache_clear()
