"""Bytes between two sockets, in plaintext, beside all tunnels: with the same promises as `ztunnel.io.relay`."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING

from ztunnel.io import sockets
from ztunnel.io.ledger import Account
from ztunnel.io.relay import Relay
from ztunnel.io.sockets import Socket

if TYPE_CHECKING:
    from ztunnel.io.pods import PodState
    from ztunnel.io.worker import Worker


class Half:
    """One direction of a plain relay."""

    __slots__ = ("eof", "pending", "reading", "shut", "writing")

    def __init__(self) -> None:
        self.pending = bytearray()
        self.reading = False
        self.writing = False
        self.eof = False
        self.shut = False


class PlainRelay(Relay):
    """Two sockets. ``near`` is the source of the connection, ``far`` its destination."""

    __slots__ = ("_backward", "_forward", "far", "far_fd", "near", "near_fd")

    def __init__(self, worker: Worker, pod: PodState, account: Account, near: Socket) -> None:
        super().__init__(worker, pod, account)
        sockets.guard(near)
        self.near = near
        self.near_fd = near.fileno()
        self.far: Socket | None = None
        self.far_fd = -1
        self._forward = Half()
        self._backward = Half()

    def start(self) -> None:
        """``far`` is connected."""
        assert self.far is not None
        sockets.guard(self.far)
        self.far_fd = self.far.fileno()
        self.worker.ledger.opened(self.account)
        self._read(self._forward)
        self._read(self._backward)

    def _read(self, half: Half) -> None:
        if not half.reading and not half.eof and not self.done:
            half.reading = True
            if half is self._forward:
                self.worker.add_reader(self.near_fd, self._near_readable)
            else:
                self.worker.add_reader(self.far_fd, self._far_readable)

    def _pause(self, half: Half) -> None:
        if half.reading:
            half.reading = False
            self.worker.remove_reader(self.near_fd if half is self._forward else self.far_fd)

    def _wait(self, half: Half) -> None:
        """Read nothing for now; a reset is told all the same."""
        if half.reading:
            half.reading = False
            self.worker.pause_reader(self.near_fd if half is self._forward else self.far_fd, self._broken)

    def _broken(self) -> None:
        for sock in (self.near, self.far):
            if sock is not None and not self.done and (error := sockets.error_of(sock)) is not None:
                self._failed(error)

    def _near_readable(self) -> None:
        assert self.far is not None
        self.account.sent += self._move(self._forward, self.near, self.far)

    def _far_readable(self) -> None:
        assert self.far is not None
        self.account.received += self._move(self._backward, self.far, self.near)

    def _near_writable(self) -> None:
        self._write(self._backward, self.near)

    def _far_writable(self) -> None:
        assert self.far is not None
        self._write(self._forward, self.far)

    def _move(self, half: Half, source: Socket, target: Socket) -> int:
        scratch = self.worker.ciphertext
        try:
            count = source.recv_into(scratch)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self._failed(error)
            return 0
        if not count:
            self._pause(half)
            half.eof = True
            self._shut(half, target)
            return 0
        try:
            sent = target.send(scratch[:count])
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self._failed(error)
            return 0
        if sent < count:
            half.pending += scratch[sent:count]
            self._wait(half)
            half.writing = True
            if half is self._forward:
                self.worker.add_writer(self.far_fd, self._far_writable)
            else:
                self.worker.add_writer(self.near_fd, self._near_writable)
        return count

    def _write(self, half: Half, target: Socket) -> None:
        try:
            sent = target.send(half.pending)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._failed(error)
            return
        del half.pending[:sent]
        if not half.pending:
            half.writing = False
            self.worker.remove_writer(self.far_fd if half is self._forward else self.near_fd)
            self._read(half)

    def _shut(self, half: Half, target: Socket) -> None:
        half.shut = True
        if self._forward.shut and self._backward.shut:
            self._finish("closed", "-", "", "", reset=False)
            return
        try:
            target.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        self.abort(f"connection: {errno.errorcode.get(error.errno or 0, str(error))}")

    def abort(self, error: str, *, flags: str = "-", policy: str = "", event: str = "closed") -> None:
        self._finish(event, flags, error, policy, reset=True)

    def _finish(self, event: str, flags: str, error: str, policy: str, *, reset: bool) -> None:
        if self.done:
            return
        self.settle(event, flags, error, policy)
        for half in (self._forward, self._backward):
            half.reading = half.writing = False
        for sock in (self.near, self.far):
            if sock is not None:
                self.worker.forget(sock.fileno())
                if reset:
                    sockets.reset(sock)
                else:
                    sockets.close(sock)
        self.released()

    def released(self) -> None:
        """Give back what the connection held; for subclasses."""
