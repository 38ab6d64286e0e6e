"""Network namespaces: enter one, run something there, tell one from another.

Two ways in. `in_netns` moves the calling thread and back: a few microseconds, for workers that run a single
thread and must not do anything else meanwhile. `run_in_netns` starts a thread of its own and is safe
anywhere. A namespace is always an open descriptor here: names and paths can be reused, descriptors cannot.

Needs CAP_SYS_ADMIN over the target namespace. Kernel refusals are PlatformFault.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Final, TypeVar

from ambient.errors import PlatformFault

CLONE_NEWNET: Final = 0x40000000
SO_NETNS_COOKIE: Final = 71
"""asm-generic/socket.h, Linux 5.14."""

T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)
_setns = _libc.setns
_setns.argtypes = (ctypes.c_int, ctypes.c_int)
_setns.restype = ctypes.c_int


class _Entered(threading.local):
    """Descriptors of the namespaces this thread is in: its own at the bottom, kept open for good."""

    def __init__(self) -> None:
        self.stack: list[int] = []


_entered = _Entered()


def open_netns(path: str) -> int:
    """Open a namespace by path (``/proc/PID/ns/net``, ``/run/netns/NAME``). The caller closes it."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise PlatformFault(f"network namespace {path}: {error.strerror}: is the pod gone?") from None


def open_pid(pid: int) -> int:
    """Open the namespace of a process."""
    return open_netns(f"/proc/{pid}/ns/net")


def open_own() -> int:
    """Open the calling thread's namespace."""
    return open_netns("/proc/thread-self/ns/net")


def inode(fd: int) -> int:
    """The number that names the namespace while it exists; `net:[N]` of /proc, netns_ino of bpf_link info."""
    return os.fstat(fd).st_ino


def _enter(fd: int) -> None:
    if _setns(fd, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        hint = "CAP_SYS_ADMIN is needed" if number == 1 else "is it a network namespace?"
        raise PlatformFault(f"setns to network namespace (descriptor {fd}): {os.strerror(number)}: {hint}")


class in_netns:
    """``with in_netns(fd): ...``: the calling thread is in the namespace inside the block. May be nested.

    Only for code that neither awaits nor starts threads inside the block.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> None:
        stack = _entered.stack
        if not stack:
            stack.append(open_own())
        _enter(self._fd)
        stack.append(self._fd)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack = _entered.stack
        stack.pop()
        _enter(stack[-1])


def run_in_netns(fd: int, function: Callable[[], T]) -> T:
    """Call ``function`` on a thread of its own inside the namespace; return or raise what it does."""
    results: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            _enter(fd)
            results.append(function())
        except BaseException as error:  # handed to the caller below
            errors.append(error)

    thread = threading.Thread(target=body, name=f"netns-{fd}", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def create_socket(fd: int, family: int, kind: int, proto: int = 0) -> socket.socket:
    """A socket that belongs to the namespace, wherever it is used afterwards. Thread-safe."""
    return run_in_netns(fd, lambda: socket.socket(family, kind, proto))


def socket_netns_cookie(sock: socket.socket) -> int:
    """The cookie of the namespace a socket belongs to: never reused while the machine is up, never 0."""
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
    except OSError as error:
        raise PlatformFault(f"SO_NETNS_COOKIE: {error.strerror}: Linux 5.14 or newer is needed") from None
    return int.from_bytes(raw, sys.byteorder)


def netns_cookie(fd: int) -> int:
    """The cookie of a namespace: what eBPF programs know it by."""
    with create_socket(fd, socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        return socket_netns_cookie(sock)
