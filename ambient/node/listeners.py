"""Opening ztunnel's listening sockets inside a pod's network namespace.

They never set SO_REUSEPORT: with it an application of the pod could join the group and be handed other
people's connections. Whoever listens on a mesh port already is refused, for the same reason.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Final

from ambient import ports
from ambient.io.netns import run_in_netns

BACKLOG: Final = 4096
"""Connections that wait while ztunnel is away; the kernel caps it at net.core.somaxconn."""

_TCP, _UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
_WANTED: Final[tuple[tuple[str, int, int, str, int], ...]] = (
    ("outbound4", socket.AF_INET, _TCP, "127.0.0.1", ports.OUTBOUND),
    ("outbound6", socket.AF_INET6, _TCP, "::1", ports.OUTBOUND),
    ("plaintext4", socket.AF_INET, _TCP, "127.0.0.1", ports.INBOUND_PLAINTEXT),
    ("plaintext6", socket.AF_INET6, _TCP, "::1", ports.INBOUND_PLAINTEXT),
    ("hbone4", socket.AF_INET, _TCP, "0.0.0.0", ports.HBONE),
    ("hbone6", socket.AF_INET6, _TCP, "::", ports.HBONE),
    ("dns_udp4", socket.AF_INET, _UDP, "127.0.0.1", ports.DNS),
    ("dns_udp6", socket.AF_INET6, _UDP, "::1", ports.DNS),
    ("dns_tcp4", socket.AF_INET, _TCP, "127.0.0.1", ports.DNS),
    ("dns_tcp6", socket.AF_INET6, _TCP, "::1", ports.DNS),
)
_MESH_PORTS: Final = ports.GUARDED | {ports.DNS}
_LISTEN: Final = "0A"  # TCP_LISTEN in /proc/net/tcp
_NO_IPV6: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


class Refused(Exception):
    """The pod cannot be enrolled. ``reason`` is one word for counters, ``detail`` a sentence for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def listening_ports(table: str) -> set[int]:
    """Ports in state LISTEN of the text of /proc/net/tcp or tcp6. Lines that cannot be read are skipped."""
    found: set[int] = set()
    for line in table.splitlines()[1:]:
        columns = line.split()
        if len(columns) > 3 and columns[3] == _LISTEN:
            try:
                found.add(int(columns[1].rpartition(":")[2], 16))
            except ValueError:
                continue
    return found


def open_listeners(netns: int) -> dict[str, int]:
    """Descriptors of every listener of `messages.LISTENERS` the namespace can have; IPv6 is left out where it is off.

    Raises Refused if an application listens on a mesh port or the namespace has no loopback.
    """
    return {name: sock.detach() for name, sock in run_in_netns(netns, _open_here).items()}


def _open_here() -> dict[str, socket.socket]:
    taken: set[int] = set()
    for name in ("tcp", "tcp6"):
        try:
            taken |= listening_ports(Path(f"/proc/thread-self/net/{name}").read_text()) & _MESH_PORTS
        except FileNotFoundError:
            pass  # no IPv6 in this kernel
    if taken:
        raise _in_use(min(taken))
    opened: dict[str, socket.socket] = {}
    try:
        for name, family, kind, address, port in _WANTED:
            sock = _open(family, kind, address, port)
            if sock is not None:
                opened[name] = sock
    except BaseException:
        for sock in opened.values():
            sock.close()
        raise
    return opened


def _open(family: int, kind: int, address: str, port: int) -> socket.socket | None:
    try:
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    except OSError as error:
        if family == socket.AF_INET6 and error.errno == errno.EAFNOSUPPORT:
            return None
        raise Refused("no_listener", f"port {port} cannot be opened: {error.strerror}") from None
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if kind == _TCP:
            # Connections of an earlier enrolment may linger on the port; a listener there still excludes us.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        if kind == _TCP:
            sock.listen(BACKLOG)
        return sock
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise _in_use(port) from None
        if family == socket.AF_INET6 and error.errno in _NO_IPV6:
            return None
        if error.errno == errno.EADDRNOTAVAIL:
            raise Refused(
                "no_loopback", "the pod's namespace has no 127.0.0.1: is its loopback interface up?"
            ) from None
        raise Refused("no_listener", f"port {port} cannot be opened: {os.strerror(error.errno or 0)}") from None


def _in_use(port: int) -> Refused:
    return Refused("mesh_port_in_use", f"something in the pod listens on port {port}, which the mesh needs")


def close_for_good(fds: dict[str, int], prefix: str = "") -> None:
    """Stop listening, whoever else has duplicates; those whose name starts with ``prefix``."""
    for name in [n for n in fds if n.startswith(prefix)]:
        with socket.socket(fileno=fds.pop(name)) as sock:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # UDP, or nobody listens any more
