"""Processors that do not sleep, as those of a busy node: there a wake-up costs little, and on a sleeping one it can be
most of a round trip."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_SPIN: Final = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not longer than the benchmark, however that ends
os.sched_setaffinity(0, {int(sys.argv[1])})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
print("spinning", flush=True)
while os.getppid() == int(sys.argv[2]):
    for _ in range(1000000):
        pass
"""


@contextmanager
def awake(processors: set[int] | None = None) -> Iterator[list[int]]:
    """Each processor runs a process that gives way to any other (SCHED_IDLE); their pids. None: all that we may use."""
    wanted = os.sched_getaffinity(0) if processors is None else processors
    spinning: list[subprocess.Popen[bytes]] = []
    try:
        for cpu in sorted(wanted):
            argv = [sys.executable, "-c", _SPIN, str(cpu), str(os.getpid())]
            spinning.append(subprocess.Popen(argv, stdout=subprocess.PIPE))
        for process in spinning:
            assert process.stdout is not None
            process.stdout.readline()
        yield [process.pid for process in spinning]
    finally:
        for process in spinning:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
