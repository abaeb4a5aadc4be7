"""Check a machine with a GPU in eight minutes: ``python -m tests.gpu.smoke``; ``docs/benchmarks.md`` says what it prints.

One process, random weights, no network. Prints one JSON object per line, ``{section, figure, value, limit, ok}``, as soon as
it is known; the exit status is 1 where a limit is missed or a section failed.
"""

import argparse
import faulthandler
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.gpu.report import Report, Section, Setup, run_sections
from tests.gpu.sizes import SIZES

SECTIONS = (
    Section("environment", "tests.gpu.environment", 40),
    Section("exactness", "tests.gpu.exactness", 90),
    Section("logits", "tests.gpu.logits", 120),
    Section("out_of_memory", "tests.gpu.logits", 40),
    Section("train_step", "tests.gpu.train_step", 120),
    Section("loss", "tests.gpu.loss", 60),
    Section("resume", "tests.gpu.resume", 90),
    Section("isolation", "tests.gpu.isolation", 40),
    Section("reader", "tests.gpu.reader", 60),
)
TOTAL_SECONDS = 480
GRACE_SECONDS = 60
"""After the last section's time is up, the process ends itself, for a library may hang where no signal reaches it."""


def main(arguments: Sequence[str]) -> int:
    """Run the check; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.smoke", description=(__doc__ or "").split(":")[0])
    parser.add_argument(
        "--size", choices=SIZES, default="full", help="toy: the same sections in seconds, without speed limits"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--strict", action="store_true", help="what cannot run here counts as failed")
    names = [section.name for section in SECTIONS]
    parser.add_argument("--only", choices=names, nargs="+", default=names, metavar="SECTION", help=", ".join(names))
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="what all sections may take together")
    chosen = parser.parse_args(arguments)
    size = SIZES[chosen.size]
    if chosen.device == "cpu" and size.is_full:
        parser.error("--size full makes models of 7 billion parameters on a GPU: with --device cpu choose --size toy")
    # cuBLAS reads it when it starts; without it no product of matrices is reproducible.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if chosen.device == "cuda" and not _sees_gpu():
        parser.error("torch sees no GPU here: run it where `nvidia-smi` shows one, or give --size toy --device cpu")
    faulthandler.dump_traceback_later(chosen.seconds + GRACE_SECONDS, exit=True)
    try:
        with tempfile.TemporaryDirectory(prefix="ptafuse-gpu-check-") as scratch:
            setup = Setup(size, chosen.device, Path(scratch))
            report = Report(sys.stdout, with_speed=setup.is_fast, strict=chosen.strict)
            sections = tuple(section for section in SECTIONS if section.name in chosen.only)
            run_sections(sections, report, setup, total_seconds=chosen.seconds)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return 1 if report.failed else 0


def _sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
