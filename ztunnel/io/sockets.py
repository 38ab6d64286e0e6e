"""Raw sockets of the relay: made in a pod's namespace, tuned once, closed gently or by RST.

`socket.SocketType` (the C class) is used instead of `socket.socket`: the relay makes thousands per second and
needs nothing of what the subclass adds.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Callable
from typing import Final, Protocol

from ambient.errors import PlatformFault

Socket = socket.SocketType

SO_COOKIE: Final = 57
KEEPALIVE_S: Final = 180
CONNECT_TIMEOUT_S: Final = 10.0
_LINGER_RESET: Final = struct.pack("ii", 1, 0)
_LINGER_NOT: Final = struct.pack("ii", 0, 0)
_CLONE_NEWNET: Final = 0x40000000
_IN_PROGRESS: Final = (errno.EINPROGRESS, errno.EALREADY)
_FLAGS: Final = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_libc = ctypes.CDLL(None, use_errno=True)


class Namespaces:
    """The network namespace this process (a single thread) is in. It stays in the last one entered, because the
    next socket is likely to be made there, too; nothing else of a worker depends on the namespace."""

    __slots__ = ("_current", "_home")

    def __init__(self) -> None:
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._current = self._home

    def enter(self, fd: int) -> None:
        """Raises PlatformFault. A negative descriptor is the namespace the process started in."""
        if fd < 0:
            fd = self._home
        if fd == self._current:
            return
        if _libc.setns(fd, _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise PlatformFault(f"setns to a pod's network namespace: {os.strerror(number)}: CAP_SYS_ADMIN is needed")
        self._current = fd

    def leave(self, fd: int) -> None:
        """Be elsewhere before ``fd`` is closed."""
        if fd == self._current:
            self.enter(self._home)


def stream_socket(ip: str) -> Socket:
    """A non-blocking TCP socket to another host, for this address's family, in the current namespace."""
    sock = Socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, _FLAGS, 0)
    tune(sock)
    return sock


def local_socket(ip: str) -> Socket:
    """The same to an application in the current namespace."""
    sock = Socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, _FLAGS, 0)
    tune_local(sock)
    return sock


def tune_local(sock: Socket) -> None:
    """For connections whose other end is in the same kernel: nothing to keep alive. Accepted sockets inherit it.

    They keep the node's congestion control. Without pacing the kernel takes megabytes for an application that made its
    receive buffer small, and over loopback's long segments it then gets them by one window probe after the other."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def tune(sock: Socket) -> None:
    """No delay and keepalive. Accepted sockets inherit both from their listener."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S)


def guard(sock: Socket) -> None:
    """An application's socket: no byte of it is lost unseen. Whoever closes it without `close` resets it: the kernel
    closes what a killed process leaves behind, and an end that nobody meant would look to the application like the
    end of all it was sent. Urgent data stays in its place among the rest, where recv() would leave it out."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    except OSError:
        pass  # the connection is gone already


def close(sock: Socket) -> None:
    """Close with FIN what was guarded, and let what it holds be sent."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    except OSError:
        pass  # the connection is gone already
    sock.close()


def reset(sock: Socket) -> None:
    """Close with RST."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
    except OSError:
        pass  # the connection is gone already
    sock.close()


def error_of(sock: Socket) -> OSError | None:
    """What broke the connection; it is told once."""
    number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return OSError(number, os.strerror(number)) if number else None


def cookie(sock: Socket) -> int:
    """SO_COOKIE: what the kernel maps know an accepted socket by."""
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), "little")


def plain_address(address: tuple[str, int] | tuple[str, int, int, int]) -> tuple[str, int]:
    """Address and port as the World writes them: an IPv4-mapped address is the IPv4 address."""
    ip = address[0]
    if ip[:7] == "::ffff:" and "." in ip:
        ip = ip[7:]
    elif "%" in ip:
        ip = ip.partition("%")[0]
    return ip, address[1]


def address_text(ip: str, port: int) -> str:
    """ADDRESS:PORT."""
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


class Clock(Protocol):
    """What `Connecting` needs of the worker."""

    def add_writer(self, fd: int, callback: Callable[[], None], /) -> object: ...

    def remove_writer(self, fd: int, /) -> object: ...

    def expire(self, thing: Expiring, after_s: float) -> None: ...

    def keep(self, thing: Expiring) -> None: ...


class Expiring(Protocol):
    """Something with a deadline."""

    def expired(self) -> None: ...


def connect(sock: Socket, ip: str, port: int) -> int:
    """Begin to connect: 0 if it is connected already, an errno if it failed, EINPROGRESS for `Connecting` to wait."""
    error = sock.connect_ex((ip, port))
    if error == errno.EINPROGRESS:
        # Over loopback or a veth the answer is often here by now; asking again saves a turn of the loop.
        error = sock.connect_ex((ip, port))
        if error in _IN_PROGRESS:
            return errno.EINPROGRESS
    return 0 if error == errno.EISCONN else error


class Connecting:
    """One connect: ``done(error)`` is called once, with 0 or an errno, perhaps before `begin` returns."""

    __slots__ = ("_clock", "_done", "_fd", "_sock")

    def __init__(self, clock: Clock, sock: Socket, done: Callable[[int], None]) -> None:
        self._clock = clock
        self._sock = sock
        self._fd = -1
        self._done = done

    def begin(self, ip: str, port: int) -> None:
        error = connect(self._sock, ip, port)
        if error == errno.EINPROGRESS:
            self.wait()
        else:
            self._done(error)

    def wait(self) -> None:
        """For a connect that is in progress."""
        self._fd = self._sock.fileno()
        self._clock.expire(self, CONNECT_TIMEOUT_S)
        self._clock.add_writer(self._fd, self._writable)

    def _writable(self) -> None:
        self.cancel()
        self._done(self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def expired(self) -> None:
        self.cancel()
        self._done(errno.ETIMEDOUT)

    def cancel(self) -> None:
        """Stop waiting; ``done`` is not called any more. The socket stays open."""
        if self._fd >= 0:
            self._clock.remove_writer(self._fd)
            self._clock.keep(self)
            self._fd = -1
