"""The lab's part of the cgroup2 tree: made by name, killed as a whole, removed from the leaves up."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path, PurePosixPath

from ambient.errors import PlatformFault
from ambient.lab.waiting import wait_until

_KILL_S = 10.0


def mount_point(mounts: str | None = None) -> Path:
    """Where cgroup2 is mounted, out of /proc/self/mounts. PlatformFault if it is not."""
    text = Path("/proc/self/mounts").read_text() if mounts is None else mounts
    for line in text.splitlines():
        fields = line.split()
        if len(fields) > 2 and fields[2] == "cgroup2":
            return Path(fields[1].encode().decode("unicode_escape"))
    raise PlatformFault("cgroup2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")


def create(relative: PurePosixPath, mount: Path | None = None) -> Path:
    """Make the directory (and its parents). Returns its absolute path."""
    path = (mount or mount_point()) / relative
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlatformFault(
            f"cgroup {path}: {error.strerror}: the lab needs root and a writable cgroup2 tree"
        ) from None
    return path


def populated(path: Path) -> bool:
    """Whether a process lives in the cgroup or below it."""
    try:
        return "populated 1" in (path / "cgroup.events").read_text()
    except OSError:
        return False


def processes(path: Path) -> tuple[int, ...]:
    """Processes of the cgroup and all below it."""
    found: list[int] = []
    for directory, _, _ in os.walk(path):
        with contextlib.suppress(OSError):
            found += map(int, (Path(directory) / "cgroup.procs").read_text().split())
    return tuple(found)


def kill(path: Path) -> None:
    """Kill everything in and below it at once (the kernel does it atomically) and wait until it is empty."""
    with contextlib.suppress(FileNotFoundError):
        (path / "cgroup.kill").write_text("1")
    wait_until(lambda: not populated(path), _KILL_S, f"processes in {path} to end")


def remove(path: Path) -> None:
    """Kill what lives there and remove the whole tree. Nothing happens if it is not there."""
    if not path.is_dir():
        return
    kill(path)
    for directory, _, _ in os.walk(path, topdown=False):
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(directory)
