"""The lab's part of the cgroup2 tree: made by name, killed as a whole, removed from the leaves up."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from ambient.io import cgroup
from ambient.lab.waiting import wait_until

_KILL_S = 10.0

mount_point = cgroup.mount_point
processes = cgroup.processes


def create(relative: PurePosixPath) -> Path:
    """Make the cgroup (and its parents) below the mount point. Returns its absolute path."""
    return cgroup.create(mount_point() / relative)


def populated(path: Path) -> bool:
    """Whether a process lives in the cgroup or below it."""
    try:
        return "populated 1" in (path / "cgroup.events").read_text()
    except OSError:
        return False


def kill(path: Path) -> None:
    """Kill everything in and below it at once (the kernel does it atomically) and wait until it is empty."""
    cgroup.kill(path)
    wait_until(lambda: not populated(path), _KILL_S, f"processes in {path} to end")


def remove(path: Path) -> None:
    """Kill what lives there and remove the whole tree. Nothing happens if it is not there."""
    if not path.is_dir():
        return
    kill(path)
    # whoever is in another process's fork may come in between: kill again, as often as it takes
    wait_until(lambda: _removed(path), _KILL_S, f"cgroup {path} to be removed")


def _removed(path: Path) -> bool:
    cgroup.kill(path)
    return cgroup.remove(path)


def enter(path: Path) -> None:
    """Move this process there."""
    cgroup.move(os.getpid(), path)
