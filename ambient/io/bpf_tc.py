"""The tc program of redirection on the interfaces of a pod: by TCX links (Linux 6.6), else as a clsact filter.

A link is pinned at ``pods/UID/enrol-IFINDEX`` beside the pod's sk_lookup and goes with it. A filter has our own handle
and stands beside those of strangers; ``pods/UID/enrol-IFINDEX-filter``, a pin of its program, says that it is there. It
goes with the interface, or here; one that a pod keeps after it left does nothing, for want of flows.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from pathlib import Path
from typing import Any, Final

from ambient.errors import PlatformFault
from ambient.io import bpf_links, bpf_sys, bpffs, netns

_SIOCGIFHWADDR: Final = 0x8927
_ARPHRD_ETHER: Final = 1
_HANDLE: Final = 0xA3B1
_PRIORITY: Final = 0xA3B1
_INGRESS: Final = 0xFFFFFFF2
"""TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)"""
_INTERFACES_MAX: Final = 8
_FILTER: Final = "-filter"


def _interfaces() -> list[int]:
    """Indexes of the Ethernet interfaces of the calling thread's namespace."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        for index, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                raw = fcntl.ioctl(sock, _SIOCGIFHWADDR, struct.pack("=16s24x", name.encode()))
                if struct.unpack_from("=H", raw, 16)[0] == _ARPHRD_ETHER:
                    found.append(index)
    return found[:_INTERFACES_MAX]


def attach(bpffs_dir: str | Path, netns_fd: int, pod_uid: str, *, links: bool = True) -> int:
    """Look at what arrives at the pod's interfaces. Returns how many were added; safe to repeat.

    ``links``: False forces filters. Raises PlatformFault or BpfFault; nothing is there if redirection is off.
    """
    if not bpf_links.can_redirect(bpffs_dir):
        return 0
    directory = bpf_links.pod_dir(bpffs_dir, pod_uid)
    prog = bpf_sys.obj_get(str(bpf_links.version_dir(bpffs_dir) / "progs" / "enrol"))

    def inside() -> int:
        added = 0
        for index in _interfaces():
            pin, mark = directory / f"enrol-{index}", directory / f"enrol-{index}{_FILTER}"
            if pin.exists():
                if _alive(pin, index):
                    continue
                pin.unlink()
            if mark.exists():
                if _filtered(index):
                    continue
                mark.unlink()
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise PlatformFault(f"{directory}: {error.strerror}") from None
            if not (links and _link(prog, index, pin, pod_uid)):
                _filter("add", index, prog)
                bpf_sys.obj_pin(prog, str(mark))
            added += 1
        return added

    try:
        return netns.run_in_netns(netns_fd, inside)
    finally:
        os.close(prog)


def _alive(pin: Path, index: int) -> bool:
    link = bpf_sys.obj_get(str(pin))
    try:
        return bpf_sys.link_info(link).target == index
    finally:
        os.close(link)


def _link(prog: int, index: int, pin: Path, uid: str) -> bool:
    """False if this kernel has no TCX."""
    try:
        link = bpf_sys.link_create(prog, index, bpf_sys.ATTACH_TCX_INGRESS, f"enrol to interface {index} of {uid}")
    except bpf_sys.BpfFault as fault:
        if fault.errno == errno.EINVAL:
            return False
        raise
    try:
        bpf_sys.obj_pin(link, str(pin))
    finally:
        os.close(link)
    return True


def _filter(command: str, index: int, prog: int = -1) -> None:
    """Add or remove our filter on an interface of the calling thread's namespace."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    with IPRoute() as route:
        same: dict[str, Any] = {"parent": _INGRESS, "handle": _HANDLE, "prio": _PRIORITY, "protocol": 3}  # ETH_P_ALL
        if command == "del":
            with contextlib.suppress(NetlinkError):
                route.tc("del-filter", "bpf", index, **same)
            return
        try:
            with contextlib.suppress(NetlinkError):  # there may be one already
                route.tc("add", "clsact", index)
            route.tc("replace-filter", "bpf", index, fd=prog, name="ambient-enrol", direct_action=True, **same)
        except NetlinkError as error:
            raise PlatformFault(f"clsact filter on interface {index}: {error}: is the module cls_bpf there?") from None


def _filtered(index: int) -> bool:
    """Whether our filter is on an interface of the calling thread's namespace."""
    from pyroute2 import IPRoute

    with IPRoute() as route:
        return any(found["handle"] == _HANDLE for found in route.get_filters(index, parent=_INGRESS))


def attached(bpffs_dir: str | Path) -> set[str]:
    """UIDs of the pods that have a link or a filter."""
    pods = bpf_links.version_dir(bpffs_dir) / "pods"
    return {pin.parent.name for pin in pods.glob("*/enrol-*")} if pods.is_dir() else set()


def _remove_filters() -> None:
    for index in _interfaces():
        _filter("del", index)


def detach(bpffs_dir: str | Path, netns_fd: int | None, pod_uid: str) -> bool:
    """Look no more. False if nothing was there. ``netns_fd`` None: the namespace is gone, and filters with it."""
    pins = list(bpf_links.pod_dir(bpffs_dir, pod_uid).glob("enrol-*"))
    for pin in pins:
        if not pin.name.endswith(_FILTER):
            link = bpf_sys.obj_get(str(pin))
            try:
                with contextlib.suppress(bpf_sys.BpfFault):
                    bpf_sys.link_detach(link)
            finally:
                os.close(link)
        pin.unlink(missing_ok=True)
    if netns_fd is not None and any(pin.name.endswith(_FILTER) for pin in pins):
        netns.run_in_netns(netns_fd, _remove_filters)
    with contextlib.suppress(PlatformFault):
        bpffs._rmdir(bpf_links.pod_dir(bpffs_dir, pod_uid))
    return bool(pins)
