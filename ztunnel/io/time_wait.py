"""Connections into a pod that ztunnel ended first linger for a minute and keep their port: this gives ports back.

Deliveries go from a pod's address to the same address, so the ephemeral ports are all there is to tell them apart:
28,232 in a minute would be 470 new connections per second, and long before that the kernel's search for a free one
takes milliseconds. The lingering guards against packets of the old connection that come late; inside one namespace
none are. So beyond `KEPT_MAX` the oldest are ended by sock_diag. Each is named by its cookie, so that never another
connection is hit that has its ports by now.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections import deque
from typing import Final

KEPT_MAX: Final = 1024
"""Of one pod and worker."""
BATCH: Final = 64
LINGER_S: Final = 55.0
"""The kernel's minute, less some: what is older has gone by itself."""

_SOCK_DIAG: Final = 4
_DESTROY: Final = 21
_REQUEST: Final = 1
_ERROR: Final = 2
_HEADER: Final = struct.Struct("=IHHII")
_WHAT: Final = struct.Struct("=BBBxI")
_PORTS: Final = struct.Struct(">HH")
_NUMBER: Final = struct.Struct("=i")
_COOKIE: Final = struct.Struct("=Q")
_BYTES: Final = _HEADER.size + 56
_HEAD: Final = _HEADER.pack(_BYTES, _DESTROY, _REQUEST, 0, 0)
_GONE: Final = (0, errno.ENOENT, errno.ESTALE)


class Lingering:
    """The ended deliveries of one pod. Construct it in the pod's namespace. Raises OSError if it cannot be."""

    __slots__ = ("_ended", "_sock", "unable")

    def __init__(self) -> None:
        self._ended: deque[tuple[float, bytes]] = deque()
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._sock = socket.socket(socket.AF_NETLINK, kind, _SOCK_DIAG)
        self.unable = ""
        """Why nothing is given back, if the kernel does not let us (CAP_NET_ADMIN, INET_DIAG_DESTROY)."""

    def close(self) -> None:
        self._sock.close()

    def ended(self, ip: str, local_port: int, port: int, cookie: int, now: float) -> None:
        """The socket with this cookie, from ``ip`` and ``local_port`` to the same address and ``port``, is closed."""
        if self.unable:
            return
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        address = socket.inet_pton(family, ip).ljust(16, b"\0")
        what = _WHAT.pack(family, socket.IPPROTO_TCP, 0, 0xFFFFFFFF) + _PORTS.pack(local_port, port)
        self._ended.append((now, _HEAD + what + address + address + bytes(4) + _COOKIE.pack(cookie)))
        if len(self._ended) >= KEPT_MAX + BATCH:
            oldest = [self._ended.popleft() for _ in range(BATCH)]
            self._give_back(b"".join(request for at, request in oldest if now - at < LINGER_S))

    def _give_back(self, requests: bytes) -> None:
        try:
            if requests:
                self._sock.send(requests)  # the kernel has done it, or has answered why not, when this returns
            while True:
                answer = self._sock.recv(4096)
                if len(answer) >= _HEADER.size + 4 and _HEADER.unpack_from(answer)[1] == _ERROR:
                    number = -_NUMBER.unpack_from(answer, _HEADER.size)[0]
                    if number not in _GONE:
                        self.unable = errno.errorcode.get(number, str(number))
        except BlockingIOError:
            pass
        except OSError as error:
            self.unable = errno.errorcode.get(error.errno or 0, str(error))
        if self.unable:
            self._ended.clear()
