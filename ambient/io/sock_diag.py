"""TCP sockets of a network namespace by the kernel's inet_diag: list them with their bytes, and destroy one.

By hand and without a library, because ztunnel's control process needs two messages of it and no more. A request is sent
in the namespace the socket was made in; give `open_diag` the namespace's descriptor. Layouts:
include/uapi/linux/inet_diag.h, tcp.h (struct tcp_info) and netlink.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ambient.errors import PlatformFault
from ambient.io import netns
from ambient.model.address import fold, packed16, parse_ip

NETLINK_SOCK_DIAG: Final = 4
SOCK_DIAG_BY_FAMILY: Final = 20
SOCK_DESTROY: Final = 21
_REQUEST, _ACK, _DUMP = 1, 4, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_INET_DIAG_INFO: Final = 2
_INET_DIAG_SKMEMINFO: Final = 7
_INET_DIAG_CGROUP_ID: Final = 21
"""Given for every socket since Linux 5.9; no bit asks for it."""
_WANTED: Final = 1 << (_INET_DIAG_INFO - 1) | 1 << (_INET_DIAG_SKMEMINFO - 1)
_ALIVE: Final = 0xFFF & ~(1 << 6 | 1 << 7 | 1 << 10)
"""States but for TIME_WAIT, CLOSE and LISTEN."""
_LISTEN: Final = 1 << 10
_BYTES_AT: Final = 120
"""Offset of tcpi_bytes_acked in struct tcp_info; tcpi_bytes_received follows."""
LIMIT_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class TcpSocket:
    """One socket; ``sent`` (acknowledged by the peer) and ``received`` are bytes, SYN and FIN counted as TCP does."""

    family: int
    state: int
    local: str
    local_port: int
    remote: str
    remote_port: int
    cookie: int
    sent: int
    received: int
    held: int = -1
    """sk_rmem_alloc: what it holds unread, redirected bytes included; -1 if the kernel did not say."""
    cgroup: int = 0
    """Id of the cgroup2 it was made in; an accepted socket has its listener's. 0 if the kernel did not say."""


def open_diag(netns_fd: int) -> socket.socket:
    """A netlink socket of the namespace. Raises OSError."""
    sock = netns.create_socket(netns_fd, socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG)
    sock.settimeout(LIMIT_S)
    return sock


def dump(sock: socket.socket) -> Iterator[TcpSocket]:
    """All connected TCP sockets. Raises OSError, PlatformFault if the kernel refuses."""
    return _dump(sock, _ALIVE)


def listening(sock: socket.socket) -> frozenset[int]:
    """Ports somebody listens on, at whatever address. Raises as `dump`."""
    return frozenset(found.local_port for found in _dump(sock, _LISTEN))


def data_bytes(found: TcpSocket, *, accepted: bool) -> tuple[int, int]:
    """Bytes of data it sent (as far as acknowledged) and received, without the SYN and FIN that TCP counts."""
    finished = found.state in (5, 6, 9, 11)  # its FIN is acknowledged or on its way
    ended = found.state in (8, 9, 11)  # the peer's FIN came
    return max(0, found.sent - int(not accepted) - int(finished)), max(0, found.received - int(ended))


def _dump(sock: socket.socket, states: int) -> Iterator[TcpSocket]:
    for family in (socket.AF_INET, socket.AF_INET6):
        body = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, _WANTED, 0, states) + bytes(48)
        sock.send(struct.pack("=IHHII", 16 + len(body), SOCK_DIAG_BY_FAMILY, _REQUEST | _DUMP, family, 0) + body)
        done = False
        while not done:
            for kind, payload in _messages(sock.recv(262144)):
                if kind == _NLMSG_DONE:
                    done = True
                elif kind == _NLMSG_ERROR:
                    number = -int(struct.unpack_from("=i", payload)[0])
                    raise PlatformFault(f"list of TCP sockets: {os.strerror(number)}")
                elif kind == SOCK_DIAG_BY_FAMILY and len(payload) >= 72:
                    yield _socket(payload)


def destroy(sock: socket.socket, local: str, local_port: int, remote: str, remote_port: int, cookie: int) -> bool:
    """Reset exactly that socket (``cookie`` is its SO_COOKIE); whether there was one.

    The application sees ECONNABORTED, the peer a reset. A dual-stack socket that talks IPv4 is found by its IPv4
    addresses. Raises PlatformFault, with EOPNOTSUPP in its text where the kernel was built without it.
    """
    own, peer = fold(parse_ip(local)), fold(parse_ip(remote))
    four = own.version == 4
    family = socket.AF_INET if four else socket.AF_INET6
    raw = [packed16(a)[12:].ljust(16, b"\0") if four else packed16(a) for a in (own, peer)]
    tuple_ = struct.pack(">HH16s16s", local_port, remote_port, *raw) + struct.pack("=IQ", 0, cookie)
    body = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF) + tuple_
    sock.send(struct.pack("=IHHII", 16 + len(body), SOCK_DESTROY, _REQUEST | _ACK, 1, 0) + body)
    for kind, payload in _messages(sock.recv(65536)):
        if kind == _NLMSG_ERROR:
            number = -int(struct.unpack_from("=i", payload)[0])
            if number in (errno.ENOENT, errno.ESTALE):
                return False
            if number:
                raise PlatformFault(f"closing a TCP socket (SOCK_DESTROY): {errno.errorcode[number]}")
            return True
    return False


def _messages(raw: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + 16 <= len(raw):
        length, kind = struct.unpack_from("=IH", raw, offset)
        if length < 16:
            return
        yield kind, raw[offset + 16 : offset + length]
        offset += (length + 3) & ~3


def _socket(payload: bytes) -> TcpSocket:
    family, state = payload[0], payload[1]
    local_port, remote_port = struct.unpack_from(">HH", payload, 4)
    cookie = struct.unpack_from("=Q", payload, 44)[0]
    size = 4 if family == socket.AF_INET else 16
    ends = [str(fold(parse_ip(socket.inet_ntop(family, payload[at : at + size])))) for at in (8, 24)]
    sent = received = 0
    held, cgroup = -1, 0
    offset = 72
    while offset + 4 <= len(payload):
        length, kind = struct.unpack_from("=HH", payload, offset)
        if length < 4:
            break
        if kind == _INET_DIAG_INFO and length >= 4 + _BYTES_AT + 16:
            sent, received = struct.unpack_from("=QQ", payload, offset + 4 + _BYTES_AT)
        elif kind == _INET_DIAG_SKMEMINFO and length >= 8:
            held = struct.unpack_from("=I", payload, offset + 4)[0]
        elif kind == _INET_DIAG_CGROUP_ID and length >= 12:
            cgroup = struct.unpack_from("=Q", payload, offset + 4)[0]
        offset += (length + 3) & ~3
    return TcpSocket(family, state, ends[0], local_port, ends[1], remote_port, cookie, sent, received, held, cgroup)
