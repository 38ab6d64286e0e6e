"""The holder's two children: started in their cgroup, watched by pidfd, adopted after a holder's death.

A pidfd tells of the death of a process that is not our child as well, so an adopted process and one that
this holder started are watched in the same way. Knows nothing of descriptors or messages.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ambient.errors import PlatformFault

BACKOFF_MAX_S = 15.0
STEADY_S = 10.0
"""A child that lived so long starts afresh: its next death is restarted at once."""
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


def restart_delay_s(quick_deaths: int) -> float:
    """How long to wait before starting again after so many quick deaths in a row: 0, 0.5, 1, 2 ... 15."""
    return 0.0 if quick_deaths <= 1 else min(BACKOFF_MAX_S, 0.5 * 2.0 ** min(quick_deaths - 2, 10))


def write_pid(path: Path, pid: int) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(f"{pid}\n")
    aside.replace(path)


class Child:
    """One process to be kept running. ``pidfd`` is -1 while there is none."""

    def __init__(self, role: str, argv: Sequence[str], cgroup: str, pid_file: Path) -> None:
        self.role = role
        self.argv = tuple(argv)
        self.cgroup = cgroup
        self.pid_file = pid_file
        self.pid = 0
        self.pidfd = -1
        self.adopted = False
        self.started = 0.0
        self.quick_deaths = 0

    @property
    def running(self) -> bool:
        return self.pidfd >= 0

    def start(self, now: float) -> None:
        """Raises PlatformFault if the process or its pidfd cannot be had."""
        # Blocked until the child has its own dispositions: a SIGTERM in between would go to our handler's copy there.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        try:
            pid = os.fork()
            if pid == 0:
                self._become()
            self.pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise PlatformFault(f"cannot start {self.role}: {error.strerror}") from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.pid, self.started, self.adopted = pid, now, False

    def _become(self) -> None:
        """In the new process: never returns."""
        try:
            os.setsid()  # a terminal's signals reach the holder only, which ends its children in order
            for number in (*_HANDLED, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            if self.cgroup:
                with open(f"{self.cgroup}/cgroup.procs", "w") as procs:
                    procs.write("0")
            os.execv(self.argv[0], self.argv)
        except OSError as error:
            sys.stderr.write(f"holder: {self.role}: {error}\n")
            sys.stderr.flush()
        finally:
            os._exit(127)

    def adopt(self, now: float) -> bool:
        """Take over the process named by the pid file if it is still this program with these arguments."""
        try:
            pid = int(self.pid_file.read_text())
            pidfd = os.pidfd_open(pid)
        except (OSError, ValueError):
            return False
        try:
            # The pidfd pins the process, so reading its arguments now cannot be about a later one.
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            ours = tuple(os.fsdecode(a) for a in argv)[1:] == self.argv[1:] and self._is_of_us(pid)
        except OSError:
            ours = False
        if not ours:
            os.close(pidfd)
            return False
        self.pid, self.pidfd, self.started, self.adopted = pid, pidfd, now, True
        return True

    def _is_of_us(self, pid: int) -> bool:
        """Anybody can give a process our arguments and wait for its number to come up; nobody else is in our cgroup,
        or, where there is none, runs this very file (containers have files of their own). Raises OSError."""
        if self.cgroup:
            return str(pid) in Path(self.cgroup, "cgroup.procs").read_text().split()
        return os.path.samefile(f"/proc/{pid}/exe", self.argv[0])

    def signal(self, number: int) -> None:
        if self.running:
            try:
                signal.pidfd_send_signal(self.pidfd, number)
            except ProcessLookupError:
                pass  # it has just ended; its pidfd says so in the next turn

    def ended(self, now: float) -> float:
        """Note the death; returns after how many seconds to start again."""
        os.close(self.pidfd)
        self.pidfd = -1
        lived = now - self.started
        self.quick_deaths = 1 if lived >= STEADY_S else self.quick_deaths + 1
        return restart_delay_s(self.quick_deaths)
