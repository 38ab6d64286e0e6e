"""A memory cgroup with a limit on what sockets may hold, and the kernel's own account of its objects."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.support.require import memory_hierarchy, require

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


def limited(limit: int) -> Limited:
    """Skips loudly where there is no such controller."""
    require("kmem.tcp")
    root = memory_hierarchy()
    assert root is not None
    return Limited(root, limit)


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
