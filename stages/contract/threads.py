"""Let the idle threads of OpenMP sleep, so that another busy process does not bring torch to a standstill.

The threads of an OpenMP region wait for each other at its end. By default they spin: libgomp, which torch's Linux wheels
carry, for 300,000 rounds, LLVM's libomp (macOS) for 200 ms. Where another process has one of the cores, the thread that
is waited for is not running, and the one that spins keeps the other core from it: with two threads on two cores a
training step takes ten times as long. Asleep, a thread costs a wake-up of some microseconds per region.

The libraries read these variables once, when they are loaded, so they must stand before torch is imported. This module
imports nothing that would load one.
"""

from collections.abc import Mapping, MutableMapping
from typing import Final

DEFAULTS: Final = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
"""libgomp obeys the first, LLVM's and Intel's OpenMP need the second too."""
USER_VARIABLES: Final = (*DEFAULTS, "GOMP_SPINCOUNT", "KMP_LIBRARY")
"""A user who has set one of them has decided how threads wait."""


def let_idle_threads_sleep(environment: MutableMapping[str, str]) -> None:
    """Set the wait policy of OpenMP's threads, unless the user has set one.

    Args:
        environment: ``os.environ``, before torch is imported.
    """
    if not any(name in environment for name in USER_VARIABLES):
        environment.update(DEFAULTS)


def wait_policy(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that decide how threads wait, for workers on other machines."""
    return {name: environment[name] for name in USER_VARIABLES if name in environment}
