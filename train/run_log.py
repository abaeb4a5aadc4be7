"""The record of a run: one JSON object a step, and the same as TensorBoard scalars."""

import json
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from torch.utils.tensorboard.writer import SummaryWriter

from train.job import StepRecord

_SCALARS = ("loss", "loss_clm", "loss_fusion", "learning_rate", "grad_norm", "tokens_per_second", "data_wait_share")


class RunLog:
    """``<output>/log.jsonl`` and ``<output>/tensorboard/``; a step stands in each once, however often it was computed.

    An interrupted run goes on from its newest checkpoint, which may lie before the last step it logged.
    """

    def __init__(self, output: Path, *, step: int) -> None:
        """Open the logs of a run that goes on after ``step`` steps; records of later steps are taken back."""
        self._path = output / "log.jsonl"
        kept = [record for record in read_log(output) if record.step <= step]
        temporary = output / ".log.jsonl.new"
        temporary.write_text("".join(_line(record) for record in kept))
        temporary.replace(self._path)
        self.last: StepRecord | None = kept[-1] if kept else None
        self._file = self._path.open("a")
        self._writer = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

    def add(self, record: StepRecord) -> None:
        """Log one step."""
        self.last = record
        self._file.write(_line(record))
        self._file.flush()
        for name in _SCALARS:
            value = getattr(record, name)
            if value is not None:
                self._writer.add_scalar(name, value, record.step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        self._writer.close()


def _line(record: StepRecord) -> str:
    return json.dumps(asdict(record), allow_nan=False) + "\n"


def read_log(output: Path) -> list[StepRecord]:
    """The records of a run, in order; a last line that a killed process left half written is skipped."""
    try:
        lines = (output / "log.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [StepRecord(**json.loads(line)) for line in lines if line.endswith("\n")]
