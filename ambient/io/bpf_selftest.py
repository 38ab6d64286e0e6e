"""Does this kernel do with the programs what they are written for? Asked before anything is pinned.

In a namespace of its own (loopback only) and a cgroup of its own: a connection is captured and its record taken, the
application is shown what it dialled, a stranger's connection is steered. Two cgroup links, one namespace link, a few
map entries; all gone afterwards, whatever happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import EnrolledValue, SettingsValue
from ambient.errors import AmbientError, PlatformFault
from ambient.io import bpf_links, bpf_sys, cgroup, netns
from ambient.io.bpf_maps import IN_SOCKETS, Maps

POD: Final = "198.18.0.1"
"""RFC 2544: addresses for tests of equipment."""
ELSEWHERE: Final = ("198.19.0.1", 9)
SO_COOKIE: Final = 57
_SIOCSIFADDR: Final = 0x8916
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 1
_LIMIT_S: Final = 5.0

_libc = ctypes.CDLL(None, use_errno=True)


def run(maps: Mapping[str, int], programs: Mapping[str, int], node_cgroup: Path) -> str:
    """Returns what was not tried ("" if all was). Raises PlatformFault naming the step that failed.

    ``maps`` and ``programs`` are descriptors by name; nobody else uses them yet.
    """
    tables = {name: bpf_sys.Table(os.dup(fd), name) for name, fd in maps.items() if name not in IN_SOCKETS}
    opened = Maps(Path("self-test"), tables)
    home = netns.open_own()
    try:
        return netns.run_in_netns(home, lambda: _inside(opened, programs, node_cgroup))
    except OSError as error:
        raise PlatformFault(f"self-test: {error}: this kernel does not do what the programs need") from None
    finally:
        os.close(home)
        opened.settings = SettingsValue()
        for table in (opened.enrolled, opened.redirects, opened._settings):
            table.clear()
        opened.listeners.delete(POD, LAYOUT["LISTENER_INBOUND_PLAINTEXT"])
        opened.close()


def _inside(maps: Maps, programs: Mapping[str, int], node_cgroup: Path) -> str:
    """On a thread of its own: it may leave its namespace for a new one."""
    if _libc.unshare(netns.CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare a network namespace (CAP_SYS_ADMIN)")
    own = netns.open_own()
    try:
        _configure_loopback()
        _steering(maps, programs["sk_lookup"], own)
        group = node_cgroup / f"ambient-selftest-{os.getpid()}"
        before = cgroup.of_pid(os.getpid())
        try:
            cgroup.create(group)
            cgroup.move(0, group)
        except AmbientError as error:
            cgroup.remove(group)
            return f"capture was not self-tested: {error}"
        try:
            _capture(maps, programs, group)
        finally:
            cgroup.move(0, before)
            cgroup.remove(group)
        return ""
    finally:
        os.close(own)


def _configure_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        address = struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(POD))
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("=16sH22x", b"lo", _IFF_UP))
        fcntl.ioctl(sock, _SIOCSIFADDR, struct.pack("=16s16s8x", b"lo:0", address))


def _listener(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.settimeout(_LIMIT_S)
    sock.bind(("127.0.0.1", port))
    sock.listen(4)
    return sock


def _expect(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise PlatformFault(f"self-test: {what}: {found!r} instead of {wanted!r}: this kernel is not supported")


def _steering(maps: Maps, program: int, own: int) -> None:
    with _listener(LAYOUT["PORT_INBOUND_PLAINTEXT"]) as listener, contextlib.ExitStack() as stack:
        maps.listeners.put(POD, LAYOUT["LISTENER_INBOUND_PLAINTEXT"], listener.fileno())
        link = bpf_sys.link_create(program, own, bpf_sys.ATTACH_SK_LOOKUP, "sk_lookup to a namespace (self-test)")
        stack.callback(os.close, link)
        client = stack.enter_context(socket.create_connection((POD, 80), timeout=_LIMIT_S))
        accepted, peer = listener.accept()
        stack.enter_context(accepted)
        _expect("a steered connection's destination", accepted.getsockname(), (POD, 80))
        _expect("a steered connection's client", peer, client.getsockname())


def _capture(maps: Maps, programs: Mapping[str, int], group: Path) -> None:
    with _listener(LAYOUT["PORT_OUTBOUND"]) as listener, contextlib.ExitStack() as stack:
        maps.enrolled[netns.socket_netns_cookie(listener)] = EnrolledValue(POD, "", 1)
        for hook in bpf_links.HOOKS:
            if hook.name in ("connect4", "getpeername4", "sock_ops"):
                link = bpf_links.attach_cgroup(programs[hook.name], hook, group)
                stack.callback(os.close, link)
        client = stack.enter_context(socket.create_connection(ELSEWHERE, timeout=_LIMIT_S))
        accepted, _ = listener.accept()
        stack.enter_context(accepted)
        _expect("the source of a captured connection", client.getsockname()[0], POD)
        _expect("the peer shown to the application", client.getpeername(), ELSEWHERE)
        raw = accepted.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8)
        record = maps.take_redirect(int.from_bytes(raw, sys.byteorder))
        found = (record.original, record.original_port) if record else None
        _expect("the record of a captured connection", found, ELSEWHERE)
