"""The end of a lab, by name alone: whatever of it is found on disk and in the kernel goes, in an order that works.

Nothing here needs the supervisor or believes what it wrote: after `kill -9` of anything it works the same. Doing
it twice does nothing the second time.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ambient.lab import cgroups, network
from ambient.lab.topology import Lab


@dataclass(frozen=True, slots=True)
class Removed:
    """What was found and is gone now."""

    processes: int
    namespaces: int
    mounts: int
    directory: bool

    def anything(self) -> bool:
        return bool(self.processes or self.namespaces or self.mounts or self.directory)


def remove(lab: Lab) -> Removed:
    """Processes, cgroups, namespaces with their links, mounts with all pins, files. PlatformFault if one resists."""
    cgroup = cgroups.mount_point() / lab.cgroup
    processes = len(cgroups.processes(cgroup)) if cgroup.is_dir() else 0
    cgroups.remove(cgroup)
    namespaces = network.remove(lab)
    mounts = _unmount(Path(lab.directory))
    directory = Path(lab.directory).is_dir()
    if directory:
        shutil.rmtree(lab.directory, ignore_errors=True)
    return Removed(processes, namespaces, mounts, directory)


def _unmount(directory: Path) -> int:
    """Everything mounted in the directory. The pins of a bpf file system go with its last mount."""
    below = f"{directory}/"
    found = [
        line.split()[1]
        for line in Path("/proc/self/mounts").read_text().splitlines()
        if line.split()[1].startswith(below)
    ]
    for path in reversed(found):
        subprocess.run(["umount", "-l", path], check=False, capture_output=True)
    return len(found)
