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
import struct
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ambient.errors import ConfigFault, PlatformFault
from ambient.node import messages as m
from ambient.node.children import Child, write_pid
from ambient.settings import NodeSettings, read_settings

PODS_MAX = 1024
CLIENTS_MAX = 8
OUTBOX_MAX = 8192
PUT_S = 5.0
"""How long ztunnel has to take a pod's listeners, or to connect at all, before the agent is told of the failure."""
RETURN_S = 2.0
"""How long a new holder waits for an adopted ztunnel's descriptors before it tells the agent what it has."""
UPGRADE_S = 30.0
AGENT_STOP_S = 5.0
_SPARE_FDS = 64
_RECEIVE_FLAGS = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
_ANCILLARY_BYTES = socket.CMSG_SPACE(m.FDS_MAX * 4)


def say(text: str) -> None:
    sys.stderr.write(f"holder: {text}\n")
    sys.stderr.flush()


class Descriptor:
    """Owns one descriptor: closed when the last one who holds or sends it lets go."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


@dataclass(frozen=True)
class Held:
    """A pod's descriptors, by the names of its PodPut."""

    pod: m.Pod
    names: tuple[str, ...]
    descriptors: tuple[Descriptor, ...]


@dataclass(eq=False)
class Request:
    """A PodPut or PodRemove of an agent that waits for ztunnel."""

    uid: str
    agent: Client
    deadline: float
    put: bool
    waiting: set[Client] = field(default_factory=set)
    acknowledged: bool = False
    error: str = ""


@dataclass(eq=False)
class Client:
    """One connection to holder.sock."""

    sock: socket.socket
    pid: int
    role: str = ""
    greeted: bool = False
    draining: bool = False
    snapshot_due: bool = False
    snapshot_unacked: int = -1
    """Puts of the first snapshot that ztunnel has not acknowledged; -1 before it was sent."""
    asked: set[str] = field(default_factory=set)
    """Pods asked for by ReturnPods."""
    unacked: dict[str, deque[Request | None]] = field(default_factory=dict)
    outbox: deque[tuple[bytes, tuple[Descriptor, ...]]] = field(default_factory=deque)


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
        self._pods: dict[str, Held] = {}
        self._fds_held = 0
        self._clients: dict[int, Client] = {}
        self._requests: set[Request] = set()
        self._starts: dict[str, float] = {}
        self._grace_end = 0.0
        self._stopping = False
        self._stop_step: tuple[Child, float] | None = None
        self._signals: set[int] = set()
        self._selector = selectors.DefaultSelector()

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
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._fds_max = hard - _SPARE_FDS

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
                    self._grace_end = now + RETURN_S
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
                self._accept(server)
            elif isinstance(what, Child):
                self._child_ended(what)
            else:
                if events & selectors.EVENT_WRITE:
                    self._flush(what)
                if events & selectors.EVENT_READ and what.sock.fileno() >= 0:
                    self._readable(what)
        return self._attend(time.monotonic())

    def _timeout(self) -> float | None:
        times = [r.deadline for r in self._requests] + list(self._starts.values())
        if self._successor is not None:
            times.append(self._successor_deadline)
        if self._stop_step is not None:
            times.append(self._stop_step[1])
        if any(c.snapshot_due for c in self._clients.values()):
            times.append(self._grace_end)
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
        for request in [r for r in self._requests if r.deadline <= now]:
            if not request.error:
                missing = ", ".join(str(c.pid) for c in request.waiting)
                request.error = (
                    f"ztunnel (process {missing}) did not answer in time"
                    if missing
                    else "no ztunnel is connected to the holder; see its log"
                )
            self._answer(request)
        for client in [c for c in self._clients.values() if c.snapshot_due]:
            self._snapshot_to_agent(client, now)
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
            for client in self._clients.values():
                if client.pid == old.pid:
                    client.draining = True
                    self._excuse(client)
            old.signal(signal.SIGTERM)

    # --- clients

    def _accept(self, server: socket.socket) -> None:
        try:
            sock, _ = server.accept()
        except OSError:
            return
        pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != 0 or len(self._clients) >= CLIENTS_MAX:
            say(f"refused a connection of process {pid}: " + ("not root" if uid else "too many connections"))
            sock.close()
            return
        sock.setblocking(False)
        client = Client(sock, pid)
        self._clients[sock.fileno()] = client
        self._selector.register(sock, selectors.EVENT_READ, client)

    def _drop(self, client: Client, why: str = "") -> None:
        if client.sock.fileno() < 0:
            return
        if why:
            say(f"{client.role or 'client'}, process {client.pid}: {why}")
        self._selector.unregister(client.sock)
        del self._clients[client.sock.fileno()]
        client.sock.close()
        client.outbox.clear()
        self._excuse(client)
        for request in [r for r in self._requests if r.agent is client]:
            self._requests.discard(request)

    def _excuse(self, client: Client) -> None:
        """Nobody waits for this client's acknowledgements any more."""
        client.unacked.clear()
        for request in list(self._requests):
            request.waiting.discard(client)
            self._answer_if_done(request)

    def _readable(self, client: Client) -> None:
        try:
            # not socket.recv_fds, which drops its flags: a started child would inherit every listener
            raw, ancillary, flags, _ = client.sock.recvmsg(m.MESSAGE_BYTES_MAX, _ANCILLARY_BYTES, _RECEIVE_FLAGS)
        except BlockingIOError:
            return
        except OSError as error:
            self._drop(client, str(error))
            return
        descriptors = tuple(Descriptor(fd) for fd in _descriptors(ancillary))
        if not raw:
            self._drop(client)
        elif flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            self._drop(client, "a message or its descriptors exceed the limits")
        else:
            try:
                message = _DECODER.decode(raw)
            except (msgspec.DecodeError, RecursionError) as error:
                self._drop(client, f"not a message: {error}")
                return
            self._handle(client, message, descriptors)

    def _handle(self, client: Client, message: m.Message, descriptors: tuple[Descriptor, ...]) -> None:
        if not client.greeted:
            if not isinstance(message, m.Hello) or message.role not in ("agent", "ztunnel"):
                self._drop(client, "the first message must be a Hello of an agent or a ztunnel")
            elif message.version != m.VERSION:
                self._drop(client, f"speaks version {message.version}, this holder {m.VERSION}")
            else:
                self._greet(client, message)
            return
        if isinstance(message, m.PodPut):
            self._put(client, message, descriptors)
        elif isinstance(message, m.PodRemove) and client.role == "agent":
            self._remove(client, message)
        elif isinstance(message, m.Ack) and client.role == "ztunnel":
            self._acknowledged(client, message)
        else:
            self._drop(client, f"unexpected {type(message).__name__}")

    def _greet(self, client: Client, hello: m.Hello) -> None:
        client.greeted, client.role = True, hello.role
        client.asked = set(hello.holds[:PODS_MAX]) - self._pods.keys()
        if client.asked:
            for uids in _chunks(sorted(client.asked), 128):
                self._send(client, m.ReturnPods(uids=uids))
        if client.role == "agent":
            for other in [c for c in self._clients.values() if c.role == "agent" and c is not client]:
                self._drop(other, "a newer agent has connected")
            client.snapshot_due = True  # sent by _attend, at once unless a ztunnel's descriptors are on their way
            return
        client.snapshot_unacked = len(self._pods)
        for held in self._pods.values():
            self._forward_put(client, held, self._open_put(held.pod.uid))
        self._send(client, m.SnapshotSent())
        self._ready_if_acknowledged(client)

    def _snapshot_to_agent(self, client: Client, now: float) -> None:
        if now < self._grace_end and self._ztunnel.adopted and self._ztunnel.running:
            ztunnel = next((c for c in self._clients.values() if c.pid == self._ztunnel.pid and c.greeted), None)
            if ztunnel is None or ztunnel.asked:
                return
        client.snapshot_due = False
        for held in self._pods.values():
            self._send(client, m.PodPut(pod=held.pod, fds=held.names), held.descriptors)
        self._send(client, m.SnapshotSent())

    # --- pods

    def _put(self, client: Client, put: m.PodPut, descriptors: tuple[Descriptor, ...]) -> None:
        uid = put.pod.uid
        returned = uid in client.asked
        client.asked.discard(uid)
        if client.role == "ztunnel" and not returned:
            self._drop(client, f"sent pod {uid}, which was not asked for")
            return
        error = self._unacceptable(put, descriptors)
        if error:
            say(f"pod {put.pod.namespace}/{put.pod.name}: {error}")
            if client.role == "agent":
                self._send(client, m.Ack(uid=uid, error=error))
            return
        if returned and uid in self._pods:  # another client was quicker
            if client.role == "agent":
                self._send(client, m.Ack(uid=uid))
            return
        self._forget(uid)
        held = Held(put.pod, put.fds, descriptors)
        self._pods[uid] = held
        self._fds_held += len(descriptors)
        if client.role == "ztunnel":
            for other in self._clients.values():
                if other.role == "agent" and other.greeted and not other.snapshot_due:
                    self._send(other, m.PodPut(pod=held.pod, fds=held.names), held.descriptors)
            return
        request = Request(uid, client, time.monotonic() + PUT_S, put=True)
        self._requests.add(request)
        for ztunnel in self._ztunnels():
            self._forward_put(ztunnel, held, request)
        self._answer_if_done(request)

    def _unacceptable(self, put: m.PodPut, descriptors: tuple[Descriptor, ...]) -> str:
        if len(put.fds) != len(descriptors):
            return f"{len(put.fds)} descriptors are named, {len(descriptors)} came"
        if not put.fds or put.fds[0] != m.NETNS or len(set(put.fds)) != len(put.fds):
            return "the first descriptor must be the network namespace, and no name may come twice"
        if set(put.fds[1:]) - set(m.LISTENERS):
            return "unknown listener names"
        old = self._pods.get(put.pod.uid)
        if old is None and len(self._pods) >= PODS_MAX:
            return f"the holder has {PODS_MAX} pods, its limit"
        if self._fds_held - (len(old.descriptors) if old else 0) + len(descriptors) > self._fds_max:
            return "the holder has no descriptors left; raise its RLIMIT_NOFILE"
        return ""

    def _forget(self, uid: str) -> None:
        old = self._pods.pop(uid, None)
        if old is not None:
            self._fds_held -= len(old.descriptors)

    def _remove(self, client: Client, remove: m.PodRemove) -> None:
        self._forget(remove.uid)
        limit = max(0.0, min(remove.drain_s, 3600.0)) + PUT_S
        request = Request(remove.uid, client, time.monotonic() + limit, put=False)
        self._requests.add(request)
        for ztunnel in self._ztunnels():
            self._send(ztunnel, remove)
            self._expect(ztunnel, remove.uid, request)
        for other in self._clients.values():
            other.asked.discard(remove.uid)
        self._answer_if_done(request)

    def _ztunnels(self) -> list[Client]:
        return [c for c in self._clients.values() if c.role == "ztunnel" and c.greeted and not c.draining]

    def _open_put(self, uid: str) -> Request | None:
        return next((r for r in self._requests if r.put and r.uid == uid), None)

    def _forward_put(self, ztunnel: Client, held: Held, request: Request | None) -> None:
        self._send(ztunnel, m.PodPut(pod=held.pod, fds=held.names), held.descriptors)
        self._expect(ztunnel, held.pod.uid, request)

    def _expect(self, ztunnel: Client, uid: str, request: Request | None) -> None:
        ztunnel.unacked.setdefault(uid, deque()).append(request)
        if request is not None:
            request.waiting.add(ztunnel)

    def _acknowledged(self, client: Client, ack: m.Ack) -> None:
        queue = client.unacked.get(ack.uid)
        if not queue:
            return  # of a message nobody waits for any more
        request = queue.popleft()
        if not queue:
            del client.unacked[ack.uid]
        if client.snapshot_unacked > 0:
            client.snapshot_unacked -= 1
            self._ready_if_acknowledged(client)
        if ack.error:
            say(f"ztunnel, process {client.pid}: pod {ack.uid}: {ack.error}")
        if request is not None:
            request.waiting.discard(client)
            request.acknowledged = request.acknowledged or not ack.error
            request.error = request.error or ack.error
            self._answer_if_done(request)

    def _ready_if_acknowledged(self, client: Client) -> None:
        if client.snapshot_unacked == 0 and self._successor is not None and client.pid == self._successor.pid:
            self._promote()

    def _answer_if_done(self, request: Request) -> None:
        if request.waiting or request not in self._requests:
            return
        if request.put and not request.acknowledged and not request.error:
            return  # no ztunnel has it yet: the next one to connect does, or the deadline passes
        self._answer(request)

    def _answer(self, request: Request) -> None:
        self._requests.discard(request)
        self._send(request.agent, m.Ack(uid=request.uid, error=request.error))

    # --- sending

    def _send(self, client: Client, message: m.Message, descriptors: tuple[Descriptor, ...] = ()) -> None:
        if client.sock.fileno() < 0:
            return
        client.outbox.append((_ENCODER.encode(message), descriptors))
        self._flush(client)

    def _flush(self, client: Client) -> None:
        while client.outbox:
            raw, descriptors = client.outbox[0]
            try:
                if descriptors:
                    socket.send_fds(client.sock, [raw], [d.fd for d in descriptors], socket.MSG_DONTWAIT)
                else:
                    client.sock.send(raw, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if len(client.outbox) > OUTBOX_MAX:
                    self._drop(client, "does not read its messages")
                    return
                break
            except OSError as error:
                self._drop(client, str(error))
                return
            client.outbox.popleft()
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.outbox else 0)
        if self._selector.get_key(client.sock).events != events:
            self._selector.modify(client.sock, events, client)


_DECODER: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(m.Message)
_ENCODER = msgspec.msgpack.Encoder()


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.extend(struct.unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4]))
    return found


def _chunks(uids: list[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(uids[i : i + size]) for i in range(0, len(uids), size)]


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
