"""Looking at a living pod from outside: where its network namespace is, and whether the mesh can serve it.

The mesh acts on sockets of the pod's namespace. Packets that a pod forwards for somebody behind it use no
socket there, so they would be neither captured nor refused: such a pod is not enrolled. None of the pod's
processes is touched or stopped for this.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ambient.errors import PlatformFault
from ambient.io.netns import CLONE_NEWNET, run_in_netns
from ambient.node.listeners import Refused

DEPTH_MAX: Final = 6
PROCESSES_MAX: Final = 4096
_KERNELS_OWN: Final = frozenset(
    ("lo", "tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0", "ip6gretap0")
)
"""Devices that a tunnel module puts into every namespace."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Namespace:
    """A network namespace found by a process in it."""

    path: str
    inode: int


def pod_directories(pods_cgroup: Path, uid: str) -> list[Path]:
    """The pod's cgroup2 directories, by the names cgroupfs and systemd drivers give.

    ``podUID`` anywhere below, or ``…-podUID_WITH_UNDERSCORES.slice``.
    """
    plain, sliced = f"pod{uid}", f"pod{uid.replace('-', '_')}.slice"
    found: list[Path] = []
    level = [pods_cgroup]
    for _ in range(DEPTH_MAX):
        below: list[Path] = []
        for directory in level:
            try:
                children = [Path(e.path) for e in os.scandir(directory) if e.is_dir(follow_symlinks=False)]
            except OSError:
                continue  # it has just gone
            for child in children:
                if child.name == plain or child.name.endswith(f"-{sliced}") or child.name in (sliced, uid):
                    found.append(child)
                else:
                    below.append(child)
        level = below
        if found:
            break
    return found


def processes(directory: Path) -> list[int]:
    """Every process in the cgroup and below, oldest number first, up to a limit."""
    pids: list[int] = []
    for folder, _, _ in os.walk(directory):
        try:
            pids += [int(line) for line in Path(folder, "cgroup.procs").read_text().split()]
        except (OSError, ValueError):
            continue
        if len(pids) > PROCESSES_MAX:
            break
    return sorted(pids)[:PROCESSES_MAX]


def namespaces_of(pods_cgroup: Path, uid: str) -> list[Namespace]:
    """The distinct network namespaces of the pod's processes, other than our own."""
    own = os.stat("/proc/self/ns/net").st_ino
    found: dict[int, Namespace] = {}
    for directory in pod_directories(pods_cgroup, uid):
        for pid in processes(directory):
            path = f"/proc/{pid}/ns/net"
            try:
                number = os.stat(path).st_ino
            except OSError:
                continue
            if number != own:
                found.setdefault(number, Namespace(path, number))
    return list(found.values())


def check_not_nested(found: list[Namespace], pod_inode: int) -> None:
    """Raises Refused if processes of the pod live in another network namespace than the pod's."""
    others = [n for n in found if n.inode != pod_inode]
    if others:
        raise Refused(
            "nested_namespaces",
            f"processes of the pod ({others[0].path}) have a network namespace of their own behind the pod's",
        )


def check_not_forwarding(netns: int) -> None:
    """Raises Refused if the namespace forwards packets.

    IPv4 forwarding is inherited from the machine by every new namespace, so where the machine forwards, it says
    nothing by itself: then it takes a further interface, to forward to.
    """
    inherited = _fresh_namespace_forwards()
    four, six, interfaces = run_in_netns(netns, _forwarding_here)
    if six:
        raise Refused("forwards", "the pod forwards IPv6 packets (net.ipv6.conf.all.forwarding=1)")
    if four and not inherited:
        raise Refused("forwards", "the pod forwards packets (net.ipv4.ip_forward=1)")
    extra = [name for name in interfaces if name not in _KERNELS_OWN]
    if four and len(extra) > 1:
        raise Refused("forwards", f"the pod forwards packets (ip_forward=1) between {', '.join(sorted(extra)[:8])}")


def _forwarding_here() -> tuple[bool, bool, list[str]]:
    return (
        _sysctl("/proc/sys/net/ipv4/ip_forward"),
        _sysctl("/proc/sys/net/ipv6/conf/all/forwarding"),
        [name for _, name in socket.if_nameindex()],
    )


def _sysctl(path: str) -> bool:
    # /proc/sys/net shows the namespace of the thread that opens it
    try:
        return Path(path).read_text().strip() != "0"
    except FileNotFoundError:
        return False  # no IPv6


def _fresh_namespace_forwards() -> bool:
    """What a namespace made just now has in ip_forward: what pods inherited."""
    results: list[bool] = []
    errors: list[int] = []

    def body() -> None:
        if _libc.unshare(CLONE_NEWNET) != 0:
            errors.append(ctypes.get_errno())
            return
        results.append(_sysctl("/proc/sys/net/ipv4/ip_forward"))

    thread = threading.Thread(target=body, name="fresh-netns", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise PlatformFault(f"unshare of a network namespace: {os.strerror(errors[0])}: CAP_SYS_ADMIN is needed")
    return results[0]
