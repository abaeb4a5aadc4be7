"""Record of a run: one JSON object per step, also as TensorBoard scalars, and in Weights & Biases if requested."""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from torch.utils.tensorboard.writer import SummaryWriter

from train.config import TrainConfig
from train.job import StepRecord, TrainJob

_SCALARS = (
    "loss",
    "loss_clm",
    "loss_fusion",
    "lambda_",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    "peak_memory_gb",
    "data_wait_share",
)


class RunLog:
    """Logs ``<output>/log.jsonl`` and ``<output>/tensorboard/``; each step is in them once, even if it was computed twice.

    An interrupted run continues from its newest checkpoint, which may lie before the last step it logged.
    """

    def __init__(self, output: Path, *, step: int, wandb: "WandbRun | None" = None) -> None:
        """Open the logs of a run that continues after ``step`` steps; records of later steps are dropped.

        Args:
            output: the job's folder.
            step: steps done.
            wandb: a run of Weights & Biases that gets the records too.
        """
        self._path = output / "log.jsonl"
        kept = [record for record in read_log(output) if record.step <= step]
        temporary = output / ".log.jsonl.new"
        temporary.write_text("".join(_line(record) for record in kept))
        temporary.replace(self._path)
        self.last: StepRecord | None = kept[-1] if kept else None
        self._file = self._path.open("a")
        self._writer = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)
        self._wandb = wandb

    def add(self, record: StepRecord) -> None:
        """Log one step."""
        self.last = record
        self._file.write(_line(record))
        self._file.flush()
        scalars = {name.rstrip("_"): getattr(record, name) for name in _SCALARS if getattr(record, name) is not None}
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, record.step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=record.step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        self._writer.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)


class WandbRun(Protocol):
    """Part of ``wandb.init``'s result that is used here."""

    def log(self, data: dict[str, Any], step: int) -> None:
        """Record one step."""

    def finish(self, exit_code: int) -> None:
        """Upload what is left."""


def check_wandb(config: TrainConfig) -> None:
    """Refuse a job that logs to Weights & Biases if that is not installed.

    Raises:
        ValueError: says what to install, or to set.
    """
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "train.wandb is set, but wandb is not installed: install the extra (`pip install ptafuse[wandb]`), or set "
            "train.wandb = false (TensorBoard and log.jsonl are written in any case)"
        )


def start_wandb(job: TrainJob) -> WandbRun | None:
    """Start a Weights & Biases run named by the job's fingerprint, so that a resumed job continues it.

    Returns None if it was not requested.

    Steps that are computed again after an interruption are not logged twice: Weights & Biases drops them.
    """
    asked = job.config.wandb
    if not asked:
        return None
    check_wandb(job.config)
    import wandb

    return wandb.init(
        project=asked if isinstance(asked, str) else "ptafuse",
        id=job.fingerprint,
        name=f"{job.model.name}-{job.fingerprint}",
        resume="allow",
        dir=job.output,
        config=job.config.result_settings(),
    )


def _line(record: StepRecord) -> str:
    return json.dumps(asdict(record), allow_nan=False) + "\n"


def log_until(output: Path, step: int) -> bytes:
    """Return the log of a run as it was after a step, as the bytes of ``log.jsonl``."""
    return "".join(_line(record) for record in read_log(output) if record.step <= step).encode()


def read_log(output: Path) -> list[StepRecord]:
    """Read the records of a run, in order; a half-written last line of a killed process is skipped."""
    try:
        lines = (output / "log.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [_record(line) for line in lines if line.endswith("\n")]


def _record(line: str | bytes) -> StepRecord:
    return StepRecord(**json.loads(line))


class LogFollower:
    """Reader of a growing log that returns each record once, even if training went back and rewrote the log."""

    def __init__(self, output: Path) -> None:
        """Begin before the log's first record; the log need not be there yet.

        Args:
            output: the job's folder.
        """
        self._path = output / "log.jsonl"
        self._digests: list[int] = []  # of the lines that were read
        self._last = b""  # the last line that was read, and where it ends: a log with other bytes there was rewritten
        self._end = 0

    @property
    def step(self) -> int:
        """Last step in the log, 0 if there is none."""
        return _record(self._last).step if self._last else 0

    def read(self) -> list[StepRecord]:
        """Return the records that were written since the last call, in order.

        If the log was rewritten, these are the records after those that it still has in common with what was read.
        """
        begin = self._end - len(self._last)
        try:
            with self._path.open("rb") as file:
                file.seek(begin)
                raw = file.read()
                if not raw.startswith(self._last):
                    file.seek(0)
                    return self._read_anew(file.read())
        except FileNotFoundError:
            return self._read_anew(b"")
        return self._taken(_whole_lines(raw[len(self._last) :]))

    def _read_anew(self, raw: bytes) -> list[StepRecord]:
        lines = _whole_lines(raw)
        pairs = zip(lines, self._digests, strict=False)
        num_kept = sum(1 for _ in takewhile(lambda pair: hash(pair[0]) == pair[1], pairs))
        del self._digests[num_kept:]
        self._last = lines[num_kept - 1] if num_kept else b""
        self._end = sum(map(len, lines[:num_kept]))
        return self._taken(lines[num_kept:])

    def _taken(self, lines: Sequence[bytes]) -> list[StepRecord]:
        if lines:
            self._digests += map(hash, lines)
            self._last = lines[-1]
            self._end += sum(map(len, lines))
        return [_record(line) for line in lines]


def _whole_lines(raw: bytes) -> list[bytes]:
    """Return the lines of a log, without a last one that is half written."""
    return [line for line in raw.splitlines(keepends=True) if line.endswith(b"\n")]
