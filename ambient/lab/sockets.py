"""Sockets inside other network namespaces, made by a thread that goes there and ends with the job."""

from __future__ import annotations

import ctypes
import os
import socket
import threading

from ambient.errors import PlatformFault
from ambient.lab.commands import netns_path

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def open_in_netns(netns: str, address: str, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """A bound socket (a listening one if ``kind`` is a stream), not blocking. PlatformFault if it cannot be."""
    made: list[socket.socket] = []
    faults: list[OSError] = []

    def work() -> None:
        try:
            descriptor = os.open(netns_path(netns), os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _libc.setns(descriptor, _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            finally:
                os.close(descriptor)
            made.append(open_here(address, port, kind))
        except OSError as error:
            faults.append(error)

    # namespaces belong to threads: this one never runs anything else
    thread = threading.Thread(target=work, name=f"netns-{netns}")
    thread.start()
    thread.join()
    if faults:
        raise PlatformFault(f"socket at {address}:{port} in {netns}: {faults[0]}") from None
    return made[0]


def open_here(address: str, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """The same in the caller's own namespace; raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, kind)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
        if kind == socket.SOCK_STREAM:
            sock.listen(128)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock
