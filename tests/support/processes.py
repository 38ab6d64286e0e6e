"""The mesh's processes of a lab's node: who they are, who took the place of whom, and whether all of them run."""

from __future__ import annotations

import os
from pathlib import Path

from ambient.lab.driver import eventually
from tests.support.clients import children
from tests.support.mesh import Mesh

ROLES = ("worker", "control", "parent", "agent", "holder")
GONE = (OSError, ValueError, StopIteration)


def patience() -> float:
    """How many times longer it may take while others use this machine as well: 1, at most 2."""
    return min(2.0, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))


def pid_of(mesh: Mesh, node: str, role: str) -> int:
    """Of worker, control, parent (of ztunnel), agent or holder. One of GONE while there is none."""
    run_dir = mesh.node_dir(node)
    file = {"agent": "agent.pid", "holder": "holder.pid"}.get(role, "ztunnel.pid")
    found = int((run_dir / file).read_text())
    Path(f"/proc/{found}/stat").stat()
    if role in ("worker", "control"):
        name = {"worker": "ztunnel-w0", "control": "ztunnel-control"}[role]
        return next(pid for pid, comm in children(found).items() if comm == name)
    return found


def successor(mesh: Mesh, node: str, role: str, old: int) -> int:
    """The process that took the place of a killed one."""

    def look() -> int:
        try:
            found = pid_of(mesh, node, role)
        except GONE:
            return 0
        return found if found != old else 0

    return eventually(look, 10, f"another {role} on {node}", pause_s=0.01)


def cgroup_pids(mesh: Mesh, node: str, name: str) -> set[int]:
    """Every process of a node's ztunnel, or of its agent and holder."""
    settings = mesh.settings(node)
    path = Path(settings.ztunnel_cgroup if name == "ztunnel" else settings.agent_cgroup)
    return set(map(int, (path / "cgroup.procs").read_text().split()))


def is_back(mesh: Mesh, node: str) -> bool:
    """Whether everything of a node runs and answers, and nothing that was replaced still does."""
    try:
        pids = [pid_of(mesh, node, role) for role in ROLES]
    except GONE:
        return False
    alone = set(pids) == {*cgroup_pids(mesh, node, "ztunnel"), *cgroup_pids(mesh, node, "agent")}
    return alone and bool(mesh.dump(node)["workloads"]) and mesh.agent(node)["ready"] is True
