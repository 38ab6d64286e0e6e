"""Processes are killed under load: no connection is refused, new ones succeed within two seconds, pods stay enrolled.

node1: a ----HBONE---- node2: b. The load is tests/proof/clients/load.c, which also does the killing, so its clock
starts with the kill.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ambient.lab.driver import eventually
from tests.support.clients import load, load_server, started_at
from tests.support.mesh import IDLE, PORT, Mesh, is_enrolled, is_ready, pod, service
from tests.support.processes import ROLES, cgroup_pids, is_back, patience, pid_of, successor

pytestmark = [pytest.mark.lab, pytest.mark.net]

PROBE = {"tcpSocket": {"port": PORT}, "periodSeconds": 1, "failureThreshold": 3}
BACK_S = 2.0
"""A new connection succeeds so soon after a kill."""
RESTARTED_S = 1.0


@pytest.fixture(scope="module")
def pair(mesh: Mesh) -> Iterator[str]:
    objects = [pod("a", "node1", command=IDLE), pod("b", "node2", command=load_server(), probe=PROBE), service("b")]
    with mesh.namespace(*objects) as name:
        yield name


def annotations_hold(mesh: Mesh, namespace: str) -> bool:
    return all(is_enrolled(found) for found in mesh.get("pods", "-n", namespace)["items"])


def enrolled_rows(mesh: Mesh, namespace: str, node: str) -> set[str]:
    return {row["workload"] for row in mesh.rows("maps", "enrolled", "--node", node) if namespace in str(row)}


@pytest.mark.parametrize("node", ["node1", "node2"], ids=["client's node", "server's node"])
@pytest.mark.parametrize("role", ROLES)
def test_a_kill_refuses_nobody_and_is_over_in_two_seconds(mesh: Mesh, pair: str, role: str, node: str) -> None:
    eventually(lambda: is_back(mesh, node), 30, f"{node} to be whole")
    ends = {role} | ({"worker", "control"} if role == "parent" else set())
    others = {other: pid_of(mesh, node, other) for other in ROLES if other not in ends}
    held = {name: enrolled_rows(mesh, pair, name) for name in ("node1", "node2")}
    assert all(held.values()), held
    with load(mesh, pair, "a", mesh.vip(pair, "b")) as running:
        old = pid_of(mesh, node, role)
        running.kill(old)
        new = successor(mesh, node, role, old)
        now = {name: enrolled_rows(mesh, pair, name) for name in ("node1", "node2")}
        found = running.await_age(2.5)
        last = running.finish()
    restarted = started_at(new) - found["begun_at"]
    slack = patience()
    print(
        f"{role} on {node}: restarted after {restarted * 1000:.0f} ms, first success {found['first_ok']:.0f} ms, "
        f"slowest {found['slowest']:.0f} ms, {last['ok']} of {last['started']}, before: {found['before']}"
    )
    assert now == held, "the maps stay as they are"
    assert others == {other: pid_of(mesh, node, other) for other in others}, "nobody else was replaced"
    agents = cgroup_pids(mesh, node, "agent")
    assert agents == {pid_of(mesh, node, "agent"), pid_of(mesh, node, "holder")}, "and nobody is there twice"
    # those that began after the kill: queued, accepted later, and none is lost
    assert (last["refused"], last["failed"]) == (0, 0), last
    assert last["ok"] == last["started"] > 100
    assert found["before"]["refused"] == 0, found
    assert 0 < found["first_ok"] < BACK_S * 1000 * slack, found
    assert found["slowest"] < BACK_S * 1000 * slack, found
    assert restarted < RESTARTED_S * slack
    if role != "worker":
        assert (found["before"]["failed"], found["kept"]["lost"]) == (0, 0), "what is open is not touched"
    assert annotations_hold(mesh, pair)


def test_all_of_ztunnel_killed_at_once_loses_only_what_was_open(mesh: Mesh, pair: str) -> None:
    eventually(lambda: is_back(mesh, "node1"), 30, "node1 to be whole")
    with load(mesh, pair, "a", mesh.vip(pair, "b"), rate=100) as running:
        parent = pid_of(mesh, "node1", "parent")
        others = cgroup_pids(mesh, "node1", "ztunnel") - {parent}
        assert len(others) == 2
        for child in others:
            os.kill(child, signal.SIGSTOP)
        running.kill(parent)
        for child in others:
            os.kill(child, signal.SIGKILL)
        found = running.await_ok(100, 8)
        last = running.finish()
    print(f"all of ztunnel: first success {found['first_ok']:.0f} ms, slowest {last['slowest']:.0f} ms: {last}")
    assert (last["refused"], last["failed"]) == (0, 0), last
    assert 0 < last["first_ok"] < BACK_S * 1000 * patience(), last


def test_an_upgrade_refuses_nobody_and_lets_connections_finish(mesh: Mesh, pair: str) -> None:
    """SIGHUP: the holder starts another ztunnel beside the old one, which drains. A connection lives on meanwhile."""
    eventually(lambda: is_back(mesh, "node1"), 30, "node1 to be whole")
    with load(mesh, pair, "a", mesh.vip(pair, "b")) as running:
        old = pid_of(mesh, "node1", "parent")
        running.kill(pid_of(mesh, "node1", "holder"), signal.SIGHUP)
        new = successor(mesh, "node1", "parent", old)
        promoted = running.report()
        drain_s = mesh.settings("node1").drain_s
        during = running.await_age(promoted["since"] / 1000 + drain_s - 1.5)
        assert Path(f"/proc/{old}").exists(), "the old ztunnel drains"
        assert during["kept"]["lost"] == 0, during
        eventually(lambda: not Path(f"/proc/{old}").exists(), drain_s + 10, "the old ztunnel to end")
        last = running.finish()
    print(
        f"upgrade: promoted {promoted['since']:.0f} ms after SIGHUP, slowest {last['slowest']:.0f} ms, {last['ok']} ok"
    )
    assert pid_of(mesh, "node1", "parent") == new
    assert (last["refused"], last["failed"], last["before"]["failed"]) == (0, 0, 0), last
    assert during["kept"]["requests"] > 0
    assert last["slowest"] < BACK_S * 1000 * patience(), last


@contextmanager
def without_agent(mesh: Mesh, node: str) -> Iterator[None]:
    """The agent is killed, and the holder stopped so that there is no other."""
    holder = pid_of(mesh, node, "holder")
    os.kill(holder, signal.SIGSTOP)
    try:
        os.kill(pid_of(mesh, node, "agent"), signal.SIGKILL)
        yield
    finally:
        os.kill(holder, signal.SIGCONT)


def refusal(mesh: Mesh, namespace: str, name: str) -> str:
    """What the events say of a pod that cannot be made."""
    events = mesh.get("events", "-n", namespace)["items"]
    return " ".join(e["message"] for e in events if e["involvedObject"].get("name") == name)


def test_without_an_agent_what_runs_goes_on_and_a_new_pod_of_the_mesh_waits(mesh: Mesh, pair: str) -> None:
    eventually(lambda: is_back(mesh, "node1"), 30, "node1 to be whole")
    outside = [pod("c", "node1", command=IDLE), pod("d", "node2")]
    with (
        mesh.namespace(*outside, enrolled=False) as plain,
        load(mesh, pair, "a", mesh.vip(pair, "b"), rate=50) as running,
    ):
        with without_agent(mesh, "node1"):
            running.mark()
            mesh.apply(pair, pod("late", "node1", account="a"))
            eventually(lambda: "ambient-cni" in refusal(mesh, pair, "late"), 15, "the new pod's refusal")
            assert "agent of this node does not answer" in refusal(mesh, pair, "late")
            found = mesh.get("pod", "late", "-n", pair)
            assert not is_ready(found) and not found["status"].get("podIPs"), "it fails closed"
            # who is there already notices nothing, in the mesh and outside
            assert mesh.call(plain, "c", mesh.address(plain, "d"), PORT).get("echoed") == "hello"
            during = running.report()
            assert during["ok"] > 0
        mesh.await_ready(pair, {"late"}, enrolled=True)
        last = running.finish()
    assert (last["failed"], last["before"]["failed"], last["kept"]["lost"]) == (0, 0, 0), last
    assert mesh.call(pair, "late", mesh.address(pair, "late"), PORT).get("echoed") == "hello"
    mesh.remove(pair, "pod", "late")
