"""Can this kernel close an established connection (SOCK_DESTROY)? Tried before any connection may pass ztunnel by.

A right that is taken away must end the flows it let in. Without CONFIG_INET_DIAG_DESTROY, or without the module
tcp_diag, nobody could: then the kernel authorizes nothing, and ztunnel, which can close what it carries, decides all.
In a namespace of its own, over loopback; everything is gone afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
from typing import Final

from ambient.errors import PlatformFault
from ambient.io import netns, sock_diag
from ambient.io.bpf_selftest_redirect import loopback_up

SO_COOKIE: Final = 57
_LIMIT_S: Final = 1.0

_libc = ctypes.CDLL(None, use_errno=True)


def run() -> str:
    """Empty if both ends of a connection that was closed so saw its end; else one sentence why not. Never raises for a
    kernel that cannot."""
    home = netns.open_own()
    try:
        said = netns.run_in_netns(home, _inside)
    except (OSError, PlatformFault) as error:
        said = str(error)
    finally:
        os.close(home)
    if not said:
        return ""
    return f"traffic within a node goes through ztunnel: this kernel does not close established connections: {said}"


def _inside() -> str:
    """On a thread of its own."""
    if _libc.unshare(netns.CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare a network namespace (CAP_SYS_ADMIN)")
    loopback_up()
    own_netns = netns.open_own()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, own_netns)
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        client = stack.enter_context(socket.create_connection(server.getsockname(), timeout=_LIMIT_S))
        accepted = stack.enter_context(server.accept()[0])
        accepted.settimeout(_LIMIT_S)
        diag = stack.enter_context(sock_diag.open_diag(own_netns))
        cookie = int.from_bytes(client.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), sys.byteorder)
        (own_ip, own_port), (peer_ip, peer_port) = client.getsockname(), client.getpeername()
        if not sock_diag.destroy(diag, own_ip, own_port, peer_ip, peer_port, cookie):
            return "SOCK_DESTROY finds no socket"
        if not (_is_reset(client) and _is_reset(accepted)):
            return "SOCK_DESTROY left it open"
    return ""


def _is_reset(sock: socket.socket) -> bool:
    try:
        sock.recv(1)
    except ConnectionError:
        return True
    except OSError:
        return False
    return False
