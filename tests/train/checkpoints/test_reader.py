"""The table of contents of a checkpoint: what it may name."""

import io
import pickle
from pathlib import PosixPath

import pytest

from train.checkpoints.reader import _Unpickler


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_are_read_as_any_version_of_python_wrote_them(module: str) -> None:
    written = f"c{module}\nPosixPath\n(S'/checkpoint'\ntR.".encode()
    assert _Unpickler(io.BytesIO(written)).load() == PosixPath("/checkpoint")


def test_a_name_that_no_checkpoint_holds_is_refused() -> None:
    written = b"cos\nsystem\n(S'true'\ntR."
    with pytest.raises(pickle.UnpicklingError, match=r"names os\.system"):
        _Unpickler(io.BytesIO(written)).load()
