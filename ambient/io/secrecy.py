"""Private keys stay in memory: a process that holds some leaves no core dump and cannot be looked into by others.

Both are inherited by fork; exec makes the second undone, so a process does this for itself when it starts.
"""

from __future__ import annotations

import ctypes
import os
import resource
from typing import Final

from ambient.errors import PlatformFault

_PR_SET_DUMPABLE: Final = 4
_libc = ctypes.CDLL(None, use_errno=True)


def no_dumps() -> None:
    """No core file, none through a pipe either (which ignores the limit), and no ptrace by the same user."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise PlatformFault(f"prctl(PR_SET_DUMPABLE): {os.strerror(ctypes.get_errno())}")
