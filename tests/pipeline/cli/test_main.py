"""What a command that ends with an error shows."""

import pytest
import typer

from pipeline.cli import main
from tests.tiny_run import ptafuse


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("model m: no good"), "ptafuse: model m: no good\n"),
        (OSError("the disk is full"), "ptafuse: the disk is full\n"),
        (
            KeyError("vocab"),
            "ptafuse: KeyError: 'vocab'. This is an unexpected error: PTAFUSE_TRACEBACK=1 shows where it comes from\n",
        ),
    ],
)
def test_an_error_is_a_message_unless_its_traceback_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr(main, "app", app)
    for value in ("", "0"):
        monkeypatch.setenv("PTAFUSE_TRACEBACK", value)
        done = ptafuse(check=False)
        assert (done.returncode, done.stderr) == (1, told)
    monkeypatch.setenv("PTAFUSE_TRACEBACK", "1")
    with pytest.raises(type(error)):
        ptafuse(check=False)
