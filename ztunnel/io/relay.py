"""Bytes between an application's socket and a stream of a tunnel.

Half-close is half-close and a reset is a reset, in both directions; a worker that is killed is a reset. Whoever
does not read slows its sender down: a socket that takes nothing stops the credit of its stream, a stream without
credit or a congested tunnel stops the reading of its socket.
"""

from __future__ import annotations

import errno
import socket
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

from ztunnel.core.frames import Code
from ztunnel.core.headers import Header
from ztunnel.core.messages import Verdict
from ztunnel.core.streams import Stream
from ztunnel.io import sockets
from ztunnel.io.ledger import Account
from ztunnel.io.sockets import Socket

if TYPE_CHECKING:
    from ztunnel.core.http2 import Connection
    from ztunnel.io.pods import PodState
    from ztunnel.io.tunnel import Tunnel
    from ztunnel.io.worker import Worker

_READS_PER_TURN: Final = 8
_BATCH_BYTES: Final = 128 * 1024
"""A batch of so much leaves before the turn's end: the peer works on it while we go on."""
POLICY_CHANGED: Final = "connection closed due to policy change"


class Relay(ABC):
    """One connection of a pod: its account, and its place among the pod's connections."""

    __slots__ = ("account", "done", "pod", "worker")

    def __init__(self, worker: Worker, pod: PodState, account: Account) -> None:
        self.worker = worker
        self.pod = pod
        self.account = account
        self.done = False
        pod.relays.add(self)

    @abstractmethod
    def abort(self, error: str, *, flags: str = "-", policy: str = "", event: str = "closed") -> None:
        """Reset both sides."""

    def lost_right(self, verdict: Verdict) -> None:
        self.worker.count("closed_by_policy")
        self.abort(POLICY_CHANGED, policy=verdict.policy)

    def settle(self, event: str, flags: str, error: str, policy: str) -> None:
        """The connection is over: once."""
        self.done = True
        self.pod.relays.discard(self)
        if event == "closed" and not self.account.number:
            event = "failed"  # it was never open
        self.worker.ledger.closed(self.account, self.worker.now(), event=event, flags=flags, error=error, policy=policy)


class StreamRelay(Relay):
    """An application's socket and a stream. ``outward``: the application is the source of the connection."""

    __slots__ = (
        "_connection",
        "_outward",
        "_pending",
        "_reading",
        "_recv_into",
        "_send",
        "_sock_eof",
        "_stream_eof",
        "_writing",
        "fd",
        "sock",
        "stream",
        "tunnel",
    )

    def __init__(self, worker: Worker, pod: PodState, account: Account, *, outward: bool) -> None:
        super().__init__(worker, pod, account)
        self._outward = outward
        self.tunnel: Tunnel | None = None
        self._connection: Connection | None = None
        self.stream: Stream | None = None
        self.sock: Socket | None = None
        self.fd = -1
        self._pending = bytearray()
        """What the application has not taken yet."""
        self._reading = False
        self._writing = False
        self._sock_eof = False
        self._stream_eof = False

    def set_socket(self, sock: Socket) -> None:
        sockets.guard(sock)
        self.sock = sock
        self.fd = sock.fileno()
        self._recv_into = sock.recv_into
        self._send = sock.send

    def set_stream(self, tunnel: Tunnel, stream: Stream) -> None:
        self.tunnel = tunnel
        self._connection = tunnel.connection
        self.stream = stream

    def start(self) -> None:
        """Both ends are there. What came early from the stream is written out."""
        self.worker.ledger.opened(self.account)
        self.resume()
        if self._pending or self._stream_eof:
            self._write()

    # --- from the application ------------------------------------------------------------------------------

    def resume(self) -> None:
        """Read from the application (again)."""
        if not self._reading and not self._sock_eof and not self.done:
            self._reading = True
            self.worker.add_reader(self.fd, self._readable)

    def _pause(self) -> None:
        if self._reading:
            self._reading = False
            self.worker.remove_reader(self.fd)

    def _wait(self) -> None:
        """Read nothing for now. A reset is told all the same: nobody may ever take what would let us read it."""
        if self._reading:
            self._reading = False
            self.worker.pause_reader(self.fd, self._broken)

    def _broken(self) -> None:
        if self.sock is not None and (error := sockets.error_of(self.sock)) is not None:
            self._socket_failed(error)

    def _readable(self) -> None:
        tunnel, connection, stream = self.tunnel, self._connection, self.stream
        assert tunnel is not None and connection is not None and stream is not None
        for _ in range(_READS_PER_TURN):
            if tunnel.backlog_bytes:
                self._wait()
                tunnel.waiting.append(self)
                return
            room = connection.reserve(stream)
            if not room:
                if room is None:
                    self._wait()
                    return
                tunnel.flush()
                if self.done:
                    return
                continue
            try:
                count = self._recv_into(room)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._socket_failed(error)
                return
            if not count:
                self._pause()
                self._sock_eof = True
                connection.finish(stream)
                tunnel.schedule()
                self._end_if_both_did()
                return
            connection.commit(stream, count)
            if self._outward:
                self.account.sent += count
            else:
                self.account.received += count
            if not tunnel.scheduled:
                tunnel.schedule()
            if connection.output.end >= _BATCH_BYTES:
                tunnel.flush()
                if self.done:
                    return
            if count < len(room) and not self.worker.turns.ended:
                return

    def stream_writable(self) -> None:
        self.resume()

    # --- to the application --------------------------------------------------------------------------------

    def stream_headers(self, fields: list[Header]) -> None:
        pass

    def stream_data(self, data: memoryview) -> None:
        count = len(data)
        if self._outward:
            self.account.received += count
        else:
            self.account.sent += count
        if self._pending or self.sock is None:
            self._pending += data
            return
        try:
            sent = self._send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self._consumed(count)
            self._socket_failed(error)
            return
        if sent:
            self._connection.consumed(self.stream, sent)  # type: ignore[union-attr, arg-type]
        if sent < count:
            self._pending += data[sent:]
            self._want_write()

    def _consumed(self, count: int) -> None:
        if self._connection is not None and self.stream is not None:
            self._connection.consumed(self.stream, count)

    def _want_write(self) -> None:
        if not self._writing:
            self._writing = True
            self.worker.add_writer(self.fd, self._write)

    def _write(self) -> None:
        pending = self._pending
        assert self.sock is not None and self.tunnel is not None
        if pending:
            try:
                sent = self.sock.send(pending)
            except (BlockingIOError, InterruptedError):
                self._want_write()
                return
            except OSError as error:
                self._socket_failed(error)
                return
            del pending[:sent]
            self._consumed(sent)
            if self._connection is not None and self._connection.output.end:
                self.tunnel.schedule()
            if pending:
                self._want_write()
                return
        if self._writing:
            self._writing = False
            self.worker.remove_writer(self.fd)
        if self._stream_eof:
            self._shut_socket()

    def stream_end(self) -> None:
        self._stream_eof = True
        if not self._pending and self.sock is not None:
            self._shut_socket()

    def _shut_socket(self) -> None:
        assert self.sock is not None
        if not self._sock_eof:
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError as error:
                self._socket_failed(error)
                return
        self._end_if_both_did()

    # --- ends ----------------------------------------------------------------------------------------------

    def _end_if_both_did(self) -> None:
        if self._sock_eof and self._stream_eof and not self._pending:
            self._finish("closed", "-", "", "", reset=False)

    def stream_reset(self, code: int) -> None:
        if self.done:
            return
        if code == Code.NO_ERROR and self._stream_eof:
            self._sock_eof = True  # the peer wants no more and has said all it had to say
            self._pause()
            self._end_if_both_did()
            return
        tunnel = self.tunnel
        error = "the tunnel was closed" if tunnel is not None and tunnel.closed else "the peer reset the connection"
        self._finish("closed", "-", error, "", reset=True)

    def _socket_failed(self, error: OSError) -> None:
        name = errno.errorcode.get(error.errno or 0, str(error))
        self._finish("closed", "-", f"the application's connection: {name}", "", reset=True)

    def abort(self, error: str, *, flags: str = "-", policy: str = "", event: str = "closed") -> None:
        self._finish(event, flags, error, policy, reset=True)

    def _finish(self, event: str, flags: str, error: str, policy: str, *, reset: bool) -> None:
        if self.done:
            return
        self.settle(event, flags, error, policy)
        sock = self.sock
        if sock is not None:
            self._reading = self._writing = False
            self.worker.forget(self.fd)
            if reset:
                sockets.reset(sock)
            else:
                sockets.close(sock)
        stream, connection = self.stream, self._connection
        if stream is not None and connection is not None:
            if not stream.dead:
                connection.reset(stream, Code.CANCEL)
            if self._pending:
                connection.consumed(stream, len(self._pending))
            if connection.output.end and self.tunnel is not None:
                self.tunnel.schedule()
        self._pending = bytearray()
        self.released()

    def released(self) -> None:
        """Give back what the connection held; for subclasses."""
