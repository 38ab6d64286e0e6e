"""What the holder keeps and for whom: pods' descriptors, the connections of agents and ztunnels, their requests.

Single-threaded and non-blocking on the holder's selector; starts no process. Descriptors are counted by
reference: one that is held, or still to be sent, stays open.
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ambient.node import messages as m

PODS_MAX = 1024
CLIENTS_MAX = 8
OUTBOX_MAX = 8192
PUT_S = 5.0
"""How long ztunnel has to take a pod's listeners, or to connect at all, before the agent is told of the failure."""
_RECEIVE_FLAGS = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
_ANCILLARY_BYTES = socket.CMSG_SPACE(m.FDS_MAX * 4)
_DECODER: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(m.Message)
_ENCODER = msgspec.msgpack.Encoder()


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


class Keeper:
    """``ready`` is called with the process number of a ztunnel that has acknowledged all it was given at first."""

    def __init__(self, selector: selectors.BaseSelector, fds_max: int, ready: Callable[[int], None]) -> None:
        self._selector = selector
        self._fds_max = fds_max
        self._ready = ready
        self._pods: dict[str, Held] = {}
        self._fds_held = 0
        self._clients: dict[int, Client] = {}
        self._requests: set[Request] = set()
        self.awaited = 0
        """A process whose descriptors are on their way: an agent's snapshot waits for them."""
        self.awaited_until = 0.0

    def deadlines(self) -> list[float]:
        times = [r.deadline for r in self._requests]
        return times + [self.awaited_until] if any(c.snapshot_due for c in self._clients.values()) else times

    def attend(self, now: float) -> None:
        """What deadlines ask for."""
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

    def event(self, client: Client, events: int) -> None:
        if client.sock.fileno() < 0:
            return  # dropped by an earlier event of the same turn
        if events & selectors.EVENT_WRITE:
            self._flush(client)
        if events & selectors.EVENT_READ and client.sock.fileno() >= 0:
            self._readable(client)

    def excuse(self, pid: int) -> None:
        """The process drains: it is given nothing more and nobody waits for its acknowledgements."""
        for client in self._clients.values():
            if client.pid == pid:
                client.draining = True
                self._excuse(client)

    # --- connections

    def accept(self, server: socket.socket) -> None:
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
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
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
        if self.awaited and now < self.awaited_until:
            ztunnel = next((c for c in self._clients.values() if c.pid == self.awaited and c.greeted), None)
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
        if client.snapshot_unacked == 0:
            client.snapshot_unacked = -1
            self._ready(client.pid)

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


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.extend(struct.unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4]))
    return found


def _chunks(uids: list[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(uids[i : i + size]) for i in range(0, len(uids), size)]
