"""Switch for tracebacks: by default, an error that the user can act on is shown as a message only."""

import os
from typing import Final

VARIABLE: Final = "PTAFUSE_TRACEBACK"
"""An environment variable; ``PTAFUSE_TRACEBACK=1`` shows the traceback behind every message."""


def shows_tracebacks() -> bool:
    """Return whether the user asks for tracebacks."""
    return os.environ.get(VARIABLE, "") not in ("", "0")
