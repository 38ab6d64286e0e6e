"""cgroup2 directories: where they are, their ids, who is in them.

A cgroup's id, as eBPF programs see it, is the inode number of its directory. Paths here are absolute paths
under the mount point, which is looked up and never assumed (/sys/fs/cgroup, /sys/fs/cgroup/unified, ...).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from ambient.errors import PlatformFault

PODS_CGROUPS: Final = (
    "kubepods",
    "kubepods.slice",
    "kubelet.slice/kubelet-kubepods.slice",
    "kubelet/kubepods",
    "kubelet/kubepods.slice",
)
"""Where kubelets put pods, below the node's cgroup: cgroupfs and systemd drivers, and both inside kind."""

_FILEID_KERNFS: Final = 0xFE
"""include/linux/exportfs.h: a handle that is a cgroup's id."""

_open_by_handle_at = ctypes.CDLL(None, use_errno=True).open_by_handle_at
_open_by_handle_at.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int)


def _unescape(text: str) -> str:
    for code, char in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        text = text.replace(code, char)
    return text


def parse_mounts(mountinfo: str, kind: str) -> list[tuple[str, Path]]:
    """(root within the file system, mount point) of each mount of a kind in the text of /proc/PID/mountinfo."""
    found = []
    for line in mountinfo.splitlines():
        left, separator, right = line.partition(" - ")
        fields = left.split()
        if separator and len(fields) >= 5 and right.split()[:1] == [kind]:
            found.append((_unescape(fields[3]), Path(_unescape(fields[4]))))
    return found


def mount_point() -> Path:
    """Where cgroup2 is mounted. Raises PlatformFault if it is not."""
    mounts = parse_mounts(Path("/proc/self/mountinfo").read_text(), "cgroup2")
    if not mounts:
        raise PlatformFault("cgroup2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified (CONFIG_CGROUPS)")
    return min(mounts, key=lambda mount: (mount[0] != "/", len(str(mount[1]))))[1]


def cgroup_id(path: str | Path) -> int:
    """Raises PlatformFault if there is no such cgroup."""
    try:
        return os.stat(path).st_ino
    except OSError as error:
        raise PlatformFault(f"cgroup {path}: {error.strerror}") from None


def path_of_id(ident: int) -> Path | None:
    """Where a cgroup is now; None if it was removed (a link to it may say its id for a while longer)."""
    handle = struct.pack("=IiQ", 8, _FILEID_KERNFS, ident)
    mount = os.open(mount_point(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = _open_by_handle_at(mount, handle, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.close(mount)
    if fd < 0:
        number = ctypes.get_errno()
        if number in (errno.ESTALE, errno.ENOENT):
            return None
        raise PlatformFault(f"cgroup with id {ident}: {os.strerror(number)}")
    try:
        return Path(os.readlink(f"/proc/self/fd/{fd}"))
    finally:
        os.close(fd)


def create(path: str | Path) -> Path:
    """Create a cgroup and what is missing above it; one that exists is fine."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise PlatformFault(f"create cgroup {path}: {error.strerror}") from None
    if not (Path(path) / "cgroup.procs").exists():
        raise PlatformFault(f"{path} is not in a cgroup2 file system (mounted at {mount_point()})")
    return Path(path)


def remove(path: str | Path) -> bool:
    """Remove an empty cgroup and the empty ones below it. False if a process is still in one of them."""
    root = Path(path)
    if not root.is_dir():
        return True
    try:
        for directory, _, _ in os.walk(root, topdown=False):
            os.rmdir(directory)
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
            return False
        if error.errno != errno.ENOENT:
            raise PlatformFault(f"remove cgroup {path}: {error.strerror}") from None
    return True


def move(pid: int, path: str | Path) -> None:
    """Move a process (0: the caller). Its sockets keep the cgroup they were made in."""
    try:
        (Path(path) / "cgroup.procs").write_text(str(pid))
    except OSError as error:
        raise PlatformFault(f"move process {pid} to cgroup {path}: {error.strerror}") from None


def of_pid(pid: int) -> Path:
    """The cgroup of a process, as a path under the mount point."""
    try:
        text = Path(f"/proc/{pid}/cgroup").read_text()
    except OSError as error:
        raise PlatformFault(f"cgroup of process {pid}: {error.strerror}") from None
    for line in text.splitlines():
        if line.startswith("0::"):
            return mount_point() / line[3:].lstrip("/")
    raise PlatformFault(f"process {pid} is in no cgroup2 hierarchy")


def processes(path: str | Path) -> set[int]:
    """The processes of the cgroup and of all below it."""
    pids: set[int] = set()
    for directory, _, _ in os.walk(path):
        try:
            pids.update(int(line) for line in Path(directory, "cgroup.procs").read_text().split())
        except OSError:
            continue  # removed meanwhile
    return pids


def kill(path: str | Path) -> None:
    """Kill every process of the cgroup and of all below it (cgroup.kill, Linux 5.14)."""
    try:
        (Path(path) / "cgroup.kill").write_text("1")
    except FileNotFoundError:
        return
    except OSError as error:
        raise PlatformFault(f"kill cgroup {path}: {error.strerror}") from None


def common_ancestor(paths: Iterable[str | Path]) -> Path:
    """The lowest cgroup that holds all of these. Raises PlatformFault if there are none."""
    known = [str(path) for path in paths]
    if not known:
        raise PlatformFault("no pod cgroup is known: name one with pods_cgroup")
    return Path(os.path.commonpath(known))


def find_pods_cgroup(node_cgroup: str | Path) -> Path:
    """The cgroup all pods of a node are in. Raises PlatformFault naming the setting if there is none."""
    for name in PODS_CGROUPS:
        candidate = Path(node_cgroup) / name
        if candidate.is_dir():
            return candidate
    raise PlatformFault(
        f"no pods cgroup below {node_cgroup} (looked for {', '.join(PODS_CGROUPS)}): name it with pods_cgroup"
    )
