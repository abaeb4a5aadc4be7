"""What the machine is: versions, and how fast its device multiplies and is filled."""

import importlib.metadata
import platform
import subprocess

import torch

from tests.gpu.models import median_seconds
from tests.gpu.report import Report, Setup
from train.config import TrainConfig
from train.model.flops import PEAK_TFLOPS, peak_flops

PACKAGES = ("torch", "transformers", "flash_attn", "numpy", "pyarrow", "tokenizers", "pydantic")


def run_environment(report: Report, setup: Setup) -> None:
    """Print versions; time a product of matrices and a copy."""
    report.add("python", platform.python_version())
    for package in PACKAGES:
        report.add(package, _version(package))
    report.add("cuda", torch.version.cuda or "none")
    device = setup.device
    if device == "cuda":
        report.add("gpu", torch.cuda.get_device_name())
        report.add("gpu_memory_gb", torch.cuda.get_device_properties(0).total_memory / 1e9)
        report.add("driver", _driver())
    else:
        report.add("gpu", "none: on the CPU")
    width = setup.size.matmul_width
    left, right = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = median_seconds(lambda: left @ right, device, setup.size.rounds)
    # An H100 or H200 with its full clock reaches 700 of its 989 TFLOP/s; of others nothing is known here.
    peak = peak_flops(TrainConfig(), torch.device(device))
    limit = ">= 700" if peak == PEAK_TFLOPS["H200"] * 1e12 else None
    report.add_speed("matmul_bf16_tflops", 2 * width**3 / seconds / 1e12, limit)
    host = torch.empty(setup.size.copy_bytes, dtype=torch.uint8, pin_memory=device == "cuda")
    there = torch.empty(setup.size.copy_bytes, dtype=torch.uint8, device=device)
    seconds = median_seconds(lambda: there.copy_(host, non_blocking=True), device, setup.size.rounds)
    report.add_speed("host_to_device_gb_per_s", setup.size.copy_bytes / seconds / 1e9)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    """Return the NVIDIA driver's version."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return f"unknown: {error}"
