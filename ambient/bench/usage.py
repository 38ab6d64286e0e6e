"""What processes use: CPU time of cgroups, resident memory of ztunnel's processes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def cpu_s(cgroups: Iterable[Path]) -> float:
    """Seconds of CPU all processes of these cgroups (and below) have used so far; also those that have ended."""
    total = 0
    for directory in cgroups:
        for line in (directory / "cpu.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "usage_usec":
                total += int(value)
    return total / 1e6


def memory(node: str, directory: Path) -> list[dict[str, Any]]:
    """Resident and proportional set size of each process of ztunnel's cgroup, by what it is."""
    rows: list[dict[str, Any]] = []
    for text in (directory / "cgroup.procs").read_text().split():
        try:
            name = Path(f"/proc/{text}/comm").read_text().strip()
            sizes = Path(f"/proc/{text}/smaps_rollup").read_text()
        except OSError:
            continue  # it has ended
        rows.append({"node": node, "role": role(name), "rss_mb": _mb(sizes, "Rss"), "pss_mb": _mb(sizes, "Pss")})
    return sorted(rows, key=lambda row: (row["node"], row["role"]))


def role(comm: str) -> str:
    """What a process of ztunnel's is, by the name it gave itself."""
    if comm == "ztunnel-control":
        return "control"
    return "worker" if comm.startswith("ztunnel-w") else "parent"


def _mb(sizes: str, name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+) kB", sizes, re.MULTILINE)
    return round(int(found[1]) / 1024, 1) if found else 0.0
