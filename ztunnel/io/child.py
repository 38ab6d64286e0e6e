"""A child of ztunnel's parent: a worker or the control process, forked, watched by pidfd, spoken to in packets.

The parent never waits for a child: what a child does not take at once queues here, and a child that takes
nothing any more is killed and started afresh.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from ambient.errors import AmbientError
from ambient.io import seqpacket
from ambient.io.seqpacket import PacketSocket
from ambient.node.messages import Ack
from ztunnel.io.descriptors import Descriptor
from ztunnel.io.outbox import Outbox

STEADY_S: Final = 10.0
"""A child that lived so long starts afresh: its next death is restarted at once."""
BACKOFF_MAX_S: Final = 5.0


def restart_delay_s(quick_deaths: int) -> float:
    """How long to wait before starting again after so many quick deaths in a row: 0, 0.1, 0.2, 0.4 ... 5."""
    return 0.0 if quick_deaths <= 1 else min(BACKOFF_MAX_S, 0.1 * 2.0 ** min(quick_deaths - 2, 10))


@dataclass(eq=False, slots=True)
class Pending:
    """A PodPut or PodRemove of the holder that waits for children."""

    uid: str
    waiting: set[Child] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Child:
    """``number`` counts the workers from 0; the control process has -1."""

    name: str
    number: int
    pid: int = 0
    pidfd: int = -1
    socket: PacketSocket[Any] | None = None
    stream: Descriptor | None = None
    """The control process's end of a worker's stream, until a control process has it."""
    started: float = 0.0
    start_at: float = 0.0
    quick_deaths: int = 0
    outbox: Outbox = field(default_factory=Outbox)
    unacked: dict[str, deque[list[Pending]]] = field(default_factory=dict)
    owed: dict[str, list[Pending]] = field(default_factory=dict)
    """Puts that an earlier process of this child did not acknowledge."""

    @property
    def running(self) -> bool:
        return self.pidfd >= 0

    def start(self, body: Callable[[int], int], now: float, keep: Iterable[int] = ()) -> None:
        """Fork. In the child ``body`` gets the descriptor of its packet socket; of the others only ``keep`` stay."""
        ours, theirs = seqpacket.pair()
        kept = {0, 1, 2, theirs.fileno(), *keep}
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _become(self.name, theirs, kept, body)
        theirs.close()
        ours.setblocking(False)
        self.pid, self.pidfd = pid, os.pidfd_open(pid)
        self.socket = PacketSocket(ours, Ack)
        self.started = now

    def send(self, message: Any, descriptors: Iterable[Descriptor] = ()) -> None:
        """Queue; nothing happens if the child is not running: it gets everything when it starts."""
        if self.socket is not None:
            self.outbox.put(message, descriptors)
            self.flush()

    def flush(self) -> None:
        """Send what the child takes. A child that takes nothing for long is killed."""
        if self.socket is not None and not self.outbox.flush(self.socket):
            self.kill()

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        if self.running:
            try:
                signal.pidfd_send_signal(self.pidfd, number)
            except ProcessLookupError:
                pass  # it has just ended; its pidfd says so in the next turn

    def ended(self, now: float) -> tuple[int, list[Pending]]:
        """Note the death: the exit code (negative: a signal), and what must not wait for this child any more."""
        code = 0
        try:
            _, status = os.waitpid(self.pid, 0)
            code = os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            pass
        os.close(self.pidfd)
        self.pidfd = -1
        if self.socket is not None:
            self.socket.close()
            self.socket = None
        self.stream = None
        self.outbox.clear()
        self.quick_deaths = 1 if now - self.started >= STEADY_S else self.quick_deaths + 1
        self.start_at = now + restart_delay_s(self.quick_deaths)
        for uid, queue in self.unacked.items():
            self.owed.setdefault(uid, []).extend(p for pendings in queue for p in pendings)
        self.unacked.clear()
        return code, [p for pendings in self.owed.values() for p in pendings]


def _become(name: str, sock: socket.socket, kept: set[int], body: Callable[[int], int]) -> None:
    """In the new process: never returns. Copies of listeners must not stay open here: they would outlive the pod."""
    code = 1
    try:
        Descriptor.disown()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        for entry in os.listdir("/proc/self/fd"):
            if int(entry) not in kept:
                seqpacket.close_all([int(entry)])
        _name_process(name)
        gc.enable()
        code = body(sock.detach())
    except AmbientError as error:
        sys.stderr.write(f"{name}: {error}\n")
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            pass
        os._exit(code & 0xFF)


def _name_process(name: str) -> None:
    """What ps shows in its short form; the arguments stay those of the parent."""
    try:
        with open("/proc/self/comm", "w") as comm:
            comm.write(name[:15])
    except OSError:
        pass
