"""Environment variables that a command passes on to the workers of a cluster.

A worker on another machine has that machine's environment: without the token of a gated model, the address of a server, or
the word that the hub cannot be reached. Ray's ``runtime_env`` could carry them, but Ray's agents write it into a log file on
every machine. So they travel as an argument of the worker, which shows only the names wherever it is printed.
"""

import os
from collections.abc import Mapping
from typing import Final

FORWARDED: Final = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "PTAFUSE_TRACEBACK",
    "WANDB_API_KEY",
)
"""Variables that mean the same everywhere. Others of their kind name files or roles of one machine (``HF_HOME``,
``AWS_PROFILE``, ``AWS_WEB_IDENTITY_TOKEN_FILE``)."""
FORWARDED_PREFIXES: Final = ("PTAFUSE_SERVER_URL", "PTAFUSE_SERVER_KEY")


class DriverEnvironment:
    """Variables of a process that are passed on to workers; picklable, and safe to print."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        """Keep those of ``variables`` that are forwarded."""
        self._values = {
            name: value for name, value in variables.items() if name in FORWARDED or name.startswith(FORWARDED_PREFIXES)
        }

    @classmethod
    def here(cls) -> "DriverEnvironment":
        """Return the forwarded variables of this process."""
        return cls(os.environ)

    def apply(self) -> None:
        """Set them in this process. Call it before anything that reads them when it is imported (``huggingface_hub``)."""
        os.environ.update(self._values)

    def __repr__(self) -> str:
        """Return the names; the values are secrets."""
        return f"DriverEnvironment({', '.join(sorted(self._values))})"
