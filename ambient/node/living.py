"""A pod's network namespace while the pod lives: finding it, noticing its end, judging it."""

from __future__ import annotations

import os
from pathlib import Path

from ambient.errors import PlatformFault
from ambient.io import netns
from ambient.node import inspect
from ambient.node.records import Record


def open_netns(record: Record, pods_cgroup: Path) -> int:
    """The namespace of the pod's ADD if that still stands, else by its processes. Raises PlatformFault.

    The caller closes the descriptor; where it was found is noted in the record.
    """
    if record.netns_path:
        try:
            fd = netns.open_netns(record.netns_path)
            if netns.inode(fd) == record.netns_inode:
                return fd
            os.close(fd)
        except PlatformFault:
            pass  # a process that has ended; another one will do
    found = inspect.namespaces_of(pods_cgroup, record.uid)
    if not found:
        raise PlatformFault(f"pod {record.namespace}/{record.name}: no process of it is found in {pods_cgroup}")
    fd = netns.open_netns(found[0].path)
    record.netns_path, record.netns_inode = found[0].path, netns.inode(fd)
    return fd


def is_gone(record: Record, pods_cgroup: Path, ended: bool) -> bool:
    """Whether the namespace is gone for certain: the file its ADD named is no more, or names another one.

    ``ended``: the API has no such pod; then no process is proof enough.
    """
    if record.gone:
        return False
    if record.netns_path and not record.netns_path.startswith("/proc/"):
        try:
            return os.stat(record.netns_path).st_ino != record.netns_inode
        except FileNotFoundError:
            return True
        except OSError:
            return False
    return ended and not inspect.namespaces_of(pods_cgroup, record.uid)


def check(record: Record, held: int | None, pods_cgroup: Path) -> None:
    """Raises Refused if the pod, as it is now, cannot be served. ``held``: its namespace, if it is open already."""
    fd = held if held is not None else open_netns(record, pods_cgroup)
    try:
        inspect.check_not_forwarding(fd)
        inspect.check_not_nested(inspect.namespaces_of(pods_cgroup, record.uid), netns.inode(fd))
    finally:
        if held is None:
            os.close(fd)
