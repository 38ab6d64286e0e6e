"""What `ambient lab` does with labs that are there: end them, look at them, enter their pods.

Light to import (no Kubernetes client), because `lab exec` is typed often and waits for it each time.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from ambient.errors import ConfigFault
from ambient.lab import cgroups, commands, record, teardown
from ambient.lab.environment import BASE_ENVIRONMENT
from ambient.lab.topology import RUN, Lab


def down(name: str) -> teardown.Removed:
    """Remove the lab of this name, whatever of it there is."""
    plan = Lab(name)
    with locked():
        return teardown.remove(plan)


@contextmanager
def locked() -> Iterator[None]:
    """One lab is made or removed at a time."""
    try:
        os.makedirs(RUN, exist_ok=True)
        lock = os.open(f"{RUN}/.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except PermissionError:
        raise ConfigFault("user", os.geteuid(), "a lab makes namespaces and cgroups: run as root") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def labs() -> list[dict[str, Any]]:
    """One row for each lab."""
    rows: list[dict[str, Any]] = []
    for name in record.names():
        try:
            found = record.read(name)
        except ConfigFault:
            rows.append({"name": name, "state": "broken"})
            continue
        rows.append(
            {
                "name": name,
                "nodes": found.nodes,
                "mesh": found.mesh,
                "state": _state(found),
                "kubeconfig": str(found.plan().kubeconfig),
            }
        )
    return rows


def _state(found: record.LabRecord) -> str:
    if not record.alive(found):
        return "crashed" if found.supervisor_pid else "starting"
    return "ready" if found.ready else "starting"


def status(found: record.LabRecord) -> tuple[list[dict[str, Any]], bool]:
    """Rows of processes and pods, and whether all of the lab's own processes run."""
    plan = found.plan()
    state = _state(found)
    rows: list[dict[str, Any]] = [
        {"kind": "supervisor", "name": plan.name, "state": state, "pid": found.supervisor_pid or None}
    ]
    well = state == "ready"
    if found.mesh:
        control = _pids(plan.cgroup / "control")
        rows.append(_process("control", "control", "", control[0] if control else 0, [plan.control4]))
        for node in plan.plans():
            for role in ("holder", "agent", "ztunnel"):
                pid = _pid_file(Path(node.directory) / "run" / f"{role}.pid")
                rows.append(_process(role, role, node.name, pid, []))
        well = well and all(row["state"] in ("ready", "running") for row in rows)
    for node in plan.plans():
        rows.append({"kind": "node", "name": node.name, "state": "running", "addresses": list(node.addresses)})
    for pod in record.pods(found):
        rows.append(
            {
                "kind": "pod",
                "namespace": pod.namespace,
                "name": pod.name,
                "node": pod.node,
                "state": "running",
                "pid": pod.pid,
                "addresses": pod.addresses,
                "uid": pod.uid,
                "netns": pod.netns,
                "cgroup": pod.cgroup,
            }
        )
    return rows, well


def _process(kind: str, name: str, node: str, pid: int, addresses: Sequence[str]) -> dict[str, Any]:
    state = "running" if pid else "not running"
    return {"kind": kind, "name": name, "node": node, "state": state, "pid": pid or None, "addresses": list(addresses)}


def _pids(cgroup: Any) -> list[int]:
    return sorted(cgroups.processes(cgroups.mount_point() / cgroup))


def _pid_file(path: Path) -> int:
    """The process ID in a file, or 0 if there is none or it does not run."""
    try:
        pid = int(path.read_text())
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError, IndexError):
        return 0
    return 0 if state in "ZX" else pid  # one that nobody has waited for yet runs no more


def stop(found: record.LabRecord, name: str) -> None:
    """End `control`, or a node's holder, agent and ztunnel, and keep them so until `start`. Pods are not touched."""
    path, cgroup = _stoppable(found, name)
    path.parent.mkdir(exist_ok=True)
    path.touch()
    for part in cgroup:
        cgroups.kill(cgroups.mount_point() / part)


def start(found: record.LabRecord, name: str) -> None:
    """Undo `stop`. The processes come back at once."""
    _stoppable(found, name)[0].unlink(missing_ok=True)


def _stoppable(found: record.LabRecord, name: str) -> tuple[Path, tuple[PurePosixPath, ...]]:
    plan = found.plan()
    known: dict[str, tuple[PurePosixPath, ...]] = {"control": (plan.cgroup / "control",)}
    known |= {node.name: (node.agent_cgroup, node.ztunnel_cgroup) for node in plan.plans()}
    if not found.mesh or name not in known:
        raise ConfigFault(f"lab {plan.name}", name, f"no such process; there are {', '.join(known)}")
    return Path(plan.stopped) / name, known[name]


def exec_line(
    found: record.LabRecord, namespace: str, name: str, container: str, command: Sequence[str]
) -> tuple[list[str], Mapping[str, str]]:
    """The command line and environment that run ``command`` in a pod."""
    pod = record.find_pod(found, namespace, name)
    cgroup = Path(pod.cgroup)
    inner = cgroup / container if container else next((p for p in sorted(cgroup.iterdir()) if p.is_dir()), cgroup)
    if not inner.is_dir():
        raise ConfigFault(f"pod {namespace}/{pod.name}", container, "no such container runs")
    directory = "/"
    try:
        first = (inner / "cgroup.procs").read_text().split()[0]
        directory = os.readlink(f"/proc/{first}/cwd")  # where the container's own program runs, as in kubectl exec
    except (OSError, IndexError):
        pass  # nothing runs in the container just now
    argv = commands.enter_argv(command, cgroup=str(inner), netns=pod.netns, pid=pod.pid, directory=directory)
    env = dict(BASE_ENVIRONMENT) | {"HOSTNAME": pod.name, "TERM": os.environ.get("TERM", "dumb")}
    # programs of the user's environment, a virtual one for instance, are wanted inside as well
    env["PATH"] = os.environ.get("PATH", env["PATH"])
    return argv, env
