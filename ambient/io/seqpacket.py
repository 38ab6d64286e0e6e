"""Packets of msgpack messages with descriptors beside them, over SOCK_SEQPACKET unix sockets.

One packet is one message; descriptors travel by SCM_RIGHTS. `PacketSocket` blocks, `AsyncPacketSocket` waits
on the running loop. Both refuse what is too long, cannot be decoded, or does not carry
the descriptors it names, and close every descriptor of a refused packet. Descriptors that arrive are
close-on-exec and belong to the caller.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Final, Generic, TypeVar, cast

import msgspec

from ambient.errors import OurFault, PeerFault

M = TypeVar("M", bound=msgspec.Struct)

MESSAGE_BYTES_MAX: Final = 16384
FDS_MAX: Final = 16
"""Limits of one packet, the same as ambient.node.messages states."""
BACKLOG: Final = 16
_FD_BYTES = array.array("i").itemsize
# Room for more descriptors than are allowed: the kernel then hands the surplus over to be closed here.
_ANCILLARY_BYTES = socket.CMSG_SPACE((FDS_MAX + 8) * _FD_BYTES)


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors; those already closed are skipped."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


class _Codec(Generic[M]):
    """Encodes and decodes packets of one union of tagged structs."""

    def __init__(self, messages: type[M] | UnionType) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(cast(Any, messages))

    def encode(self, message: M, fds: Sequence[int]) -> tuple[bytes, list[tuple[int, int, bytes]]]:
        """Raises OurFault if the message breaks a limit or names other descriptors than are given."""
        raw = self._encoder.encode(message)
        if len(raw) > MESSAGE_BYTES_MAX:
            raise OurFault(f"{type(message).__name__} has {len(raw)} bytes, at most {MESSAGE_BYTES_MAX} fit a packet")
        if len(fds) > FDS_MAX:
            raise OurFault(f"{type(message).__name__} has {len(fds)} descriptors, at most {FDS_MAX} fit a packet")
        named = getattr(message, "fds", None)
        if named is not None and len(named) != len(fds):
            raise OurFault(f"{type(message).__name__} names {len(named)} descriptors and {len(fds)} were given")
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
        return raw, ancillary

    def decode(self, raw: bytes, ancillary: list[tuple[int, int, bytes]], flags: int) -> tuple[M, tuple[int, ...]]:
        """Raises PeerFault, with every descriptor closed."""
        fds = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) - len(data) % _FD_BYTES])
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise PeerFault(f"a packet is longer than {MESSAGE_BYTES_MAX} bytes or {FDS_MAX} descriptors")
            if len(fds) > FDS_MAX:
                raise PeerFault(f"a packet carries {len(fds)} descriptors, at most {FDS_MAX} are allowed")
            try:
                message = self._decoder.decode(raw)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise PeerFault(f"a packet of {len(raw)} bytes is no message: {error}") from None
            named = getattr(message, "fds", None)
            if named is not None and len(named) != len(fds):
                raise PeerFault(f"{type(message).__name__} names {len(named)} descriptors and carries {len(fds)}")
        except PeerFault:
            close_all(fds)
            raise
        return message, tuple(fds)


class PacketSocket(Generic[M]):
    """A connected SOCK_SEQPACKET socket speaking one union of messages; blocks as the socket does.

    Raises BlockingIOError (from `send` and `receive`) if the socket is non-blocking and not ready, OSError as
    the kernel does.
    """

    def __init__(self, sock: socket.socket, messages: type[M] | UnionType) -> None:
        self.socket = sock
        self._codec: _Codec[M] = _Codec(messages)

    def fileno(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        self.socket.close()

    def send(self, message: M, fds: Sequence[int] = ()) -> None:
        """Send one message with copies of the descriptors, which stay the caller's. Raises OurFault, OSError."""
        raw, ancillary = self._codec.encode(message, fds)
        self.socket.sendmsg([raw], ancillary, socket.MSG_NOSIGNAL)

    def receive(self) -> tuple[M, tuple[int, ...]] | None:
        """One message and its descriptors; None when the peer is gone. Raises PeerFault, OSError."""
        try:
            raw, ancillary, flags, _ = self.socket.recvmsg(MESSAGE_BYTES_MAX, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            return None
        if not raw and not ancillary:
            return None
        return self._codec.decode(raw, ancillary, flags)


class AsyncPacketSocket(Generic[M]):
    """The same on a running event loop. One task receives; any number may send, in the order they called."""

    def __init__(self, sock: socket.socket, messages: type[M] | UnionType) -> None:
        sock.setblocking(False)
        self._packets: PacketSocket[M] = PacketSocket(sock, messages)
        self._sending = asyncio.Lock()

    def fileno(self) -> int:
        return self._packets.fileno()

    def close(self) -> None:
        self._packets.close()

    async def send(self, message: M, fds: Sequence[int] = ()) -> None:
        """Raises OurFault, OSError. The descriptors must stay open until this returns."""
        async with self._sending:
            while True:
                try:
                    return self._packets.send(message, fds)
                except BlockingIOError:
                    await self._ready(write=True)

    async def receive(self) -> tuple[M, tuple[int, ...]] | None:
        """One message and its descriptors; None when the peer is gone. Raises PeerFault, OSError."""
        while True:
            try:
                return self._packets.receive()
            except BlockingIOError:
                await self._ready(write=False)

    async def _ready(self, *, write: bool) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        fd = self._packets.fileno()
        if fd < 0:
            raise BrokenPipeError("the packet socket is closed")
        add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
        add(fd, wake)
        try:
            await ready
        finally:
            remove(fd)


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected packet sockets, for a process and its child."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def connect(path: str | Path) -> socket.socket:
    """A blocking connection to the listener at ``path``. Raises OSError if nobody listens there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(str(path))
    except BaseException:
        sock.close()
        raise
    return sock


def listen(path: str | Path) -> socket.socket:
    """A listener at ``path``, mode 0600; a socket that an earlier process left there is replaced."""
    path = Path(path)
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mask = os.umask(0o177)
    try:
        sock.bind(str(path))
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(mask)
    return sock
