"""bpf file systems: where pins live. A pin keeps its object alive when no process holds it."""

from __future__ import annotations

import ctypes
import fcntl
import os
from pathlib import Path
from typing import Final

from ambient.errors import PlatformFault
from ambient.io.cgroup import parse_mounts

DEFAULT_MOUNT: Final = Path("/sys/fs/bpf")
_LOCK: Final = "/run/ambient-bpffs.lock"

_libc = ctypes.CDLL(None, use_errno=True)


def mounted_at(path: str | Path) -> Path | None:
    """The bpf file system a path is (or would be) in; None if it would be in another one."""
    real = Path(os.path.realpath(path))
    for directory in (real, *real.parents):
        if os.path.ismount(directory):
            mounts = parse_mounts(Path("/proc/self/mountinfo").read_text(), "bpf")
            return directory if any(point == directory for _, point in mounts) else None
    return None


def ensure(path: str | Path) -> Path:
    """Create a directory in a bpf file system, mounting one if there is none; returns the real path.

    Under /sys/fs/bpf the mount goes there, once for everybody; elsewhere at the path itself. Raises
    PlatformFault. A name with a dot is refused, because the kernel reserves those.
    """
    real = Path(os.path.realpath(path))
    with open(_LOCK, "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        point = mounted_at(real)
        if point is None:
            point = DEFAULT_MOUNT if real.is_relative_to(DEFAULT_MOUNT) else real
            try:
                point.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise PlatformFault(f"mount a bpf file system at {point}: {error.strerror}") from None
            if _libc.mount(b"bpf", os.fsencode(point), b"bpf", 0, b"mode=0700") != 0:
                raise PlatformFault(
                    f"mount a bpf file system at {point}: {os.strerror(ctypes.get_errno())} (CAP_SYS_ADMIN)"
                )
        inside = real.relative_to(point)
        if "." in str(inside) and str(inside) != ".":
            raise PlatformFault(f"{real}: names in a bpf file system have no dots")
        try:
            real.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PlatformFault(f"create {real}: {error.strerror}") from None
    return real


def remove_tree(path: str | Path) -> None:
    """Remove pins and directories; objects die with their last holder. Nothing there is fine."""
    for directory, names, files in os.walk(path, topdown=False):
        for name in files:
            Path(directory, name).unlink(missing_ok=True)
        for name in names:
            _rmdir(Path(directory, name))
    _rmdir(Path(path))


def _rmdir(path: Path) -> None:
    try:
        path.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise PlatformFault(f"remove {path}: {error.strerror}") from None
