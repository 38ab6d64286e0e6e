"""A limit on what the sockets of a memory cgroup may hold, and the kernel's own account of its objects."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from ambient.io import cgroup
from tests.support.require import memory_hierarchy, require

_PROGRAM = 4 << 20
"""More than a small program needs for itself."""
_LIMIT = "memory.kmem.tcp.limit_in_bytes"
_PREFIX = "ambient-test-"


class Limited:
    """A memory cgroup whose sockets may hold ``limit`` bytes together. Needs cgroup v1."""

    def __init__(self, root: Path, limit: int) -> None:
        for path in root.glob(f"{_PREFIX}*"):  # left by crashed sessions
            if not Path(f"/proc/{path.name.removeprefix(_PREFIX)}").exists():
                with contextlib.suppress(OSError):
                    path.rmdir()
        self._root = root
        self.path = root / f"{_PREFIX}{os.getpid()}"
        self.path.mkdir()
        self.limit(limit)

    def limit(self, limit: int) -> None:
        (self.path / _LIMIT).write_text(str(limit))

    def said(self, name: str) -> int:
        """``usage_in_bytes``, ``max_usage_in_bytes`` or ``failcnt``."""
        return int((self.path / f"memory.kmem.tcp.{name}").read_text())

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Sockets this thread makes or accepts now are charged here for life."""
        thread = str(threading.get_native_id())
        (self.path / "tasks").write_text(thread)
        try:
            yield
        finally:
            (self._root / "tasks").write_text(thread)

    def enter(self) -> None:
        """The calling process, for good."""
        (self.path / "tasks").write_text(str(os.getpid()))

    def close(self) -> bool:
        """False while a process is in it."""
        with contextlib.suppress(OSError):
            self.path.rmdir()
        return not self.path.exists()


class LimitedPod:
    """The same of cgroup v2: memory.max of a pod, beyond what it holds already. Socket memory counts with all other.

    The kernel may also look for a process to kill; that only the pod's own could be one is the caller's concern.
    """

    _NAMES: ClassVar = {"usage_in_bytes": "memory.current", "max_usage_in_bytes": "memory.peak"}

    def __init__(self, pod: Path, limit: int) -> None:
        self.path, self._limit = pod, limit
        top = cgroup.mount_point()
        for level in reversed(pod.relative_to(top).parents):
            (top / level / "cgroup.subtree_control").write_text("+memory")
        self.limit(limit + _PROGRAM)

    def limit(self, limit: int) -> None:
        (self.path / "memory.max").write_text(str(int((self.path / "memory.current").read_text()) + limit))

    def said(self, name: str) -> int:
        """As `Limited`; ``failcnt`` is how often the limit was met, ``kills`` how often a process was killed for it."""
        if name in self._NAMES:
            return int((self.path / self._NAMES[name]).read_text())
        events = dict(line.split() for line in (self.path / "memory.events").read_text().splitlines())
        return int(events[{"failcnt": "max", "kills": "oom_kill"}[name]])

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """The process is in the pod: what it accepts and allocates now is charged there, without a limit yet."""
        home = cgroup.of_pid(os.getpid())
        (self.path / "memory.max").write_text("max")
        cgroup.move(0, self.path)
        try:
            yield
        finally:
            cgroup.move(0, home)
            self.limit(self._limit)

    def enter(self) -> None:
        """A process of the pod is there already."""

    def close(self) -> bool:
        (self.path / "memory.max").write_text("max")
        return True


def limited(limit: int, pod: Path) -> Limited | LimitedPod:
    """``pod``: the cgroup that cgroup v2 limits. Skips loudly where nothing limits what sockets hold."""
    require("memcg")
    root = memory_hierarchy()
    return Limited(root, limit) if root else LimitedPod(pod, limit)


def objects(cache: str) -> int:
    """Objects of a slab cache in use (/proc/slabinfo); those that wait free on a processor count too."""
    for line in Path("/proc/slabinfo").read_text().splitlines():
        name, *fields = line.split()
        if name == cache:
            return int(fields[0])
    raise AssertionError(f"/proc/slabinfo has no {cache}")


def slab_bytes() -> int:
    """All of the kernel's slabs (/proc/meminfo)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Slab:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/meminfo has no Slab")
