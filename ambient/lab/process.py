"""A process of the lab that must always run: started in its cgroup and namespace, logged, restarted at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import ambient
from ambient.lab import commands

log = logging.getLogger(__name__)
RESTART_FIRST_S, RESTART_LONGEST_S, STEADY_S = 0.1, 5.0, 5.0
_LOOK_S = 0.1


def python_module(module: str, *args: str) -> list[str]:
    return [sys.executable, "-m", module, *args]


def child_environment() -> dict[str, str]:
    """The supervisor's environment, with this very package in the path wherever the user started it."""
    root = str(Path(ambient.__file__).resolve().parent.parent)
    path = [root, *(part for part in os.environ.get("PYTHONPATH", "").split(":") if part and part != root)]
    return dict(os.environ) | {"PYTHONPATH": ":".join(path), "PYTHONUNBUFFERED": "1"}


class KeptProcess:
    """`run` starts it, and starts it again whenever it ends, until cancelled; then it is killed.

    While a file of its name exists in ``stopped`` it is not started: the user wants to see the lab without it.
    """

    def __init__(
        self, name: str, argv: Sequence[str], *, cgroup: Path, netns: str, log_file: Path, stopped: Path
    ) -> None:
        self.name = name
        self.pid = 0
        self.starts = 0
        self._stopped = stopped / name
        self._argv = commands.enter_argv(argv, cgroup=str(cgroup), netns=commands.netns_path(netns))
        self._log_file = log_file

    async def run(self) -> None:
        pause_s = RESTART_FIRST_S
        while True:
            if self._stopped.exists():
                await asyncio.sleep(_LOOK_S)
                continue
            started = time.monotonic()
            with self._log_file.open("ab") as file:
                process = await asyncio.create_subprocess_exec(
                    *self._argv,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    env=child_environment(),
                    start_new_session=True,
                )
            self.pid, self.starts = process.pid, self.starts + 1
            try:
                code = await process.wait()
            except asyncio.CancelledError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
                raise
            finally:
                self.pid = 0
            if self._stopped.exists():
                continue
            # one that ends again and again is given time; one that ran well is back at once
            pause_s = RESTART_FIRST_S if time.monotonic() - started > STEADY_S else min(pause_s * 2, RESTART_LONGEST_S)
            log.warning(
                "%s ended with %d, starting it again in %.1f s; see %s", self.name, code, pause_s, self._log_file
            )
            await asyncio.sleep(pause_s)
