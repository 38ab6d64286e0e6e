"""The holder: keeps the listening sockets of this node's pods, and keeps the agent and ztunnel running.

``python -m ambient.node.holder --config FILE``. It is the first process of the node's pod, so it does as
little as possible: one loop, no threads, few imports. Descriptors come from the agent over holder.sock
(`ambient.node.messages`); each ztunnel and each new agent gets duplicates, so listeners outlive both. A new
holder takes them back from a ztunnel or an agent that outlived the old one.

SIGTERM ends the children in order, SIGHUP replaces ztunnel without losing a connection. It knows nothing of
Kubernetes, of maps, or of what the sockets are for.
"""

from __future__ import annotations

import fcntl
import os
import resource
import selectors
import signal
import socket
import sys
import time
from pathlib import Path

from ambient.errors import ConfigFault, PlatformFault
from ambient.node.children import Child, write_pid
from ambient.node.keeper import CLIENTS_MAX, Keeper, say
from ambient.settings import NodeSettings, read_settings

RETURN_S = 2.0
"""How long a new holder waits for an adopted ztunnel's descriptors before it tells the agent what it has."""
UPGRADE_S = 30.0
AGENT_STOP_S = 5.0
_SPARE_FDS = 64


class Holder:
    """Construct, then `run`. ``agent_argv`` and ``ztunnel_argv`` are the children's programs."""

    def __init__(self, settings: NodeSettings, agent_argv: tuple[str, ...], ztunnel_argv: tuple[str, ...]) -> None:
        self._run_dir = Path(settings.run_dir)
        self._drain_s = settings.drain_s
        self._ztunnel_argv, self._ztunnel_cgroup = ztunnel_argv, settings.ztunnel_cgroup
        self._agent = Child("agent", agent_argv, settings.agent_cgroup, self._run_dir / "agent.pid")
        self._ztunnel = self._new_ztunnel()
        self._successor: Child | None = None
        self._successor_deadline = 0.0
        self._leaving: list[Child] = []
        self._starts: dict[str, float] = {}
        self._stopping = False
        self._stop_step: tuple[Child, float] | None = None
        self._signals: set[int] = set()
        self._selector = selectors.DefaultSelector()
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._keeper = Keeper(self._selector, hard - _SPARE_FDS, self._ztunnel_ready)

    def _new_ztunnel(self) -> Child:
        return Child("ztunnel", self._ztunnel_argv, self._ztunnel_cgroup, self._run_dir / "ztunnel.pid")

    # --- life

    def run(self) -> int:
        """Until SIGTERM. Returns the exit code. Raises PlatformFault if the node has a holder already."""
        self._run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self._run_dir / "holder.pid", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PlatformFault(f"{self._run_dir}: another holder runs here; end it first") from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda n, _: self._signals.add(n))
        self._selector.register(wake_read, selectors.EVENT_READ, None)

        path = self._run_dir / "holder.sock"
        path.unlink(missing_ok=True)
        server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        old_mask = os.umask(0o177)
        server.bind(str(path))
        os.umask(old_mask)
        server.listen(CLIENTS_MAX)
        self._selector.register(server, selectors.EVENT_READ, "server")

        now = time.monotonic()
        for child in (self._ztunnel, self._agent):
            if child.adopt(now):
                say(f"adopted {child.role}, process {child.pid}")
                self._selector.register(child.pidfd, selectors.EVENT_READ, child)
                if child is self._ztunnel:
                    self._keeper.awaited, self._keeper.awaited_until = child.pid, now + RETURN_S
            else:
                self._start(child, now)
        while not self._turn(server, wake_read):
            pass
        path.unlink(missing_ok=True)
        return 0

    def _turn(self, server: socket.socket, wake_read: int) -> bool:
        for key, events in self._selector.select(self._timeout()):
            what = key.data
            if what is None:
                while _drained(wake_read):
                    pass
            elif what == "server":
                self._keeper.accept(server)
            elif isinstance(what, Child):
                self._child_ended(what)
            else:
                self._keeper.event(what, events)
        return self._attend(time.monotonic())

    def _timeout(self) -> float | None:
        times = self._keeper.deadlines() + list(self._starts.values())
        if self._successor is not None:
            times.append(self._successor_deadline)
        if self._stop_step is not None:
            times.append(self._stop_step[1])
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _attend(self, now: float) -> bool:
        """What signals and deadlines ask for. True when it is time to exit."""
        signals, self._signals = self._signals, set()
        if signal.SIGCHLD in signals:
            _reap({c.pid for c in (self._agent, self._ztunnel, self._successor, *self._leaving) if c and c.running})
        if signal.SIGHUP in signals and not self._stopping:
            self._upgrade(now)
        if signals & {signal.SIGTERM, signal.SIGINT}:
            self._stopping = True
        self._keeper.attend(now)
        if self._successor is not None and now >= self._successor_deadline:
            say(f"the new ztunnel, process {self._successor.pid}, is not ready in {UPGRADE_S:g} s: keeping the old one")
            self._successor.signal(signal.SIGKILL)
            self._leaving.append(self._successor)
            self._successor = None
        if self._stopping:
            return self._stop(now)
        for child in (self._agent, self._ztunnel):
            if not child.running and self._starts.get(child.role, 0.0) <= now:
                self._start(child, now)
        return False

    def _stop(self, now: float) -> bool:
        """End the agent, then ztunnel, which drains. True when all are gone."""
        if self._stop_step is not None:
            stopping, deadline = self._stop_step
            if stopping.running:
                if now >= deadline:
                    say(f"{stopping.role}, process {stopping.pid}, does not end: killing it")
                    stopping.signal(signal.SIGKILL)
                    self._stop_step = (stopping, now + AGENT_STOP_S)
                return False
            self._stop_step = None
        self._starts.clear()
        for child in (self._agent, self._successor, self._ztunnel, *self._leaving):
            if child is not None and child.running:
                child.signal(signal.SIGTERM)
                limit = AGENT_STOP_S if child is self._agent else self._drain_s + AGENT_STOP_S
                self._stop_step = (child, now + limit)
                return False
        return True

    # --- children

    def _start(self, child: Child, now: float) -> None:
        try:
            child.start(now)
        except PlatformFault as fault:
            say(str(fault))
            self._starts[child.role] = now + 1.0
            return
        self._starts.pop(child.role, None)
        self._selector.register(child.pidfd, selectors.EVENT_READ, child)
        if child is not self._successor:
            write_pid(child.pid_file, child.pid)
        say(f"started {child.role}, process {child.pid}")

    def _child_ended(self, child: Child) -> None:
        self._selector.unregister(child.pidfd)
        now = time.monotonic()
        status = _reap_one(child.pid)
        delay = child.ended(now)
        if self._keeper.awaited == child.pid:
            self._keeper.awaited = 0
        self._signals.add(signal.SIGCHLD)  # orphans behind this one can be collected now
        if child is self._successor:
            say(f"the new ztunnel, process {child.pid}, ended{status} before it was ready: keeping the old one")
            self._successor = None
        elif child in self._leaving:
            say(f"the old ztunnel, process {child.pid}, has drained")
            self._leaving.remove(child)
        else:
            if child is self._ztunnel and self._successor is not None:
                child.pid_file.unlink(missing_ok=True)
                self._promote()
                return
            say(f"{child.role}, process {child.pid}, ended{status}" + (f": again in {delay:g} s" if delay else ""))
            child.pid_file.unlink(missing_ok=True)
            self._starts[child.role] = now + delay

    def _upgrade(self, now: float) -> None:
        if self._successor is not None:
            return
        self._successor = self._new_ztunnel()
        self._successor_deadline = now + UPGRADE_S
        self._start(self._successor, now)
        if not self._successor.running:
            self._successor = None

    def _promote(self) -> None:
        """The new ztunnel has every listener (or the old one is dead): it is the node's ztunnel now."""
        old, new = self._ztunnel, self._successor
        assert new is not None
        self._ztunnel, self._successor = new, None
        write_pid(new.pid_file, new.pid)
        if old.running:
            say(f"ztunnel, process {new.pid}, replaces process {old.pid}, which drains")
            self._leaving.append(old)
            self._keeper.excuse(old.pid)
            old.signal(signal.SIGTERM)

    def _ztunnel_ready(self, pid: int) -> None:
        if self._successor is not None and pid == self._successor.pid:
            self._promote()


def _drained(pipe: int) -> bytes:
    try:
        return os.read(pipe, 512)
    except BlockingIOError:
        return b""


def _reap(children: set[int]) -> None:
    """Collect orphans that ended: we may be process 1. Our own children are collected with their pidfd."""
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if found is None or found.si_pid in children:
            return  # the pidfd is readable too: its turn comes, and SIGCHLD of the others is looked at then
        _reap_one(found.si_pid)


def _reap_one(pid: int) -> str:
    """Collect a child; how it ended, for the log."""
    try:
        _, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return ""  # adopted: not our child
    code = os.waitstatus_to_exitcode(status)
    return f" by signal {-code}" if code < 0 else f" with code {code}"


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0] != "--config":
        sys.stderr.write("usage: python -m ambient.node.holder --config FILE\n")
        return 2
    config = os.path.abspath(arguments[1])
    try:
        settings = read_settings(NodeSettings, Path(config).read_text(), config)
        python = sys.executable
        return Holder(
            settings,
            (python, "-m", "ambient.node.agent", "--config", config),
            (python, "-m", "ztunnel", "--config", config),
        ).run()
    except (OSError, ConfigFault, PlatformFault) as error:
        say(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
