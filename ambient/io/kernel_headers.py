"""Kernel headers for compiling at run time. Only user-space API and generic headers are used, so any kernel's do."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ambient.errors import PlatformFault


def find(release: str, destination: Path, root: Path = Path("/")) -> Path | None:
    """Where bcc shall look (BCC_KERNEL_SOURCE); None if it finds them by itself.

    In this order: those of the running kernel (``release``), /sys/kernel/kheaders.tar.xz, any installed
    package, of which Debian splits each in two (-amd64 and -common): those are merged into a tree of links at
    ``destination``. Raises PlatformFault naming the package to install.
    """
    if (root / "lib/modules" / release / "build").is_dir() or (root / "sys/kernel/kheaders.tar.xz").exists():
        return None
    sources = root / "usr/src"
    candidates = sorted(
        (path for path in sources.glob("linux-headers-*") if (path / "include/generated/autoconf.h").exists()),
        key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)],
    )
    candidates += sorted(path for path in sources.glob("kernels/*") if (path / "include/generated/autoconf.h").exists())
    for candidate in reversed(candidates):
        commons = [
            path
            for path in sources.glob("linux-headers-*-common*")
            if candidate.name.startswith(path.name.partition("-common")[0] + "-")
        ]
        for trees in ([candidate], *([candidate, common] for common in commons)):
            if any((tree / "include/linux/kconfig.h").exists() for tree in trees):
                if len(trees) == 1:
                    return candidate
                merge(trees, destination)
                return destination
    raise PlatformFault(
        f"no kernel headers: neither /lib/modules/{release}/build nor /sys/kernel/kheaders.tar.xz nor any "
        "/usr/src/linux-headers-*: apt-get install linux-headers-amd64 (any version will do)"
    )


def merge(trees: list[Path], destination: Path) -> None:
    """A tree of links to all of these trees; where two have the same file, the first wins."""
    destination.mkdir(parents=True, exist_ok=True)
    for name in sorted({entry for tree in trees for entry in os.listdir(tree)}):
        hits = [tree / name for tree in trees if (tree / name).exists()]
        if len(hits) > 1 and all(hit.is_dir() for hit in hits):
            merge(hits, destination / name)
        elif hits:
            (destination / name).symlink_to(hits[0].resolve())
