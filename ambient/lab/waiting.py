"""Waiting for a condition of the system that sends no notice: look, pause a little longer each time, give up."""

from __future__ import annotations

import select
import time
from collections.abc import Callable

from ambient.errors import PlatformFault

_FIRST_S, _LONGEST_S = 0.002, 0.1


def wait_until(condition: Callable[[], object], limit_s: float, what: str) -> None:
    """Return once ``condition()`` is true. PlatformFault naming ``what`` after ``limit_s``."""
    deadline = time.monotonic() + limit_s
    pause_s = _FIRST_S
    while not condition():
        if time.monotonic() > deadline:
            raise PlatformFault(f"waited {limit_s:g} s in vain for {what}")
        select.select((), (), (), pause_s)
        pause_s = min(pause_s * 1.5, _LONGEST_S)
