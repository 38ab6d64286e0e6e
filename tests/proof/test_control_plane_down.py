"""The control plane is killed and kept down: what is known serves on. It comes back: changes flow again.

node1: a, x, counted; node2: b. The API server runs on; only the control plane is away.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ambient.lab import cgroups
from ambient.lab.driver import eventually
from tests.support.clients import children, load, load_server
from tests.support.mesh import APPS, PORT, Mesh, authorization, pod, service

pytestmark = [pytest.mark.lab, pytest.mark.net]

PROBE = {"tcpSocket": {"port": PORT}, "periodSeconds": 1, "failureThreshold": 3}


@pytest.fixture(scope="module")
def shop(mesh: Mesh) -> Iterator[str]:
    counted = pod("counted", "node1", command=load_server(), probe=PROBE)
    with mesh.namespace(pod("a", "node1"), pod("x", "node1"), pod("b", "node2"), service("b"), counted) as name:
        yield name


def control_pids(mesh: Mesh) -> set[int]:
    path = cgroups.mount_point() / mesh.lab.cgroup / "control" / "cgroup.procs"
    return set(map(int, path.read_text().split()))


@contextmanager
def control_plane_down(mesh: Mesh) -> Iterator[None]:
    """Killed; the one that the lab starts in its place is stopped before it can listen."""
    old = control_pids(mesh)
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    (new,) = eventually(lambda: control_pids(mesh) - old, 10, "the lab to start another", pause_s=0.005)
    os.kill(new, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(new, signal.SIGCONT)


def connected(mesh: Mesh, node: str) -> bool:
    return mesh.agent(node)["control"]["connected"] is True


def test_what_is_known_serves_on_and_changes_flow_when_it_is_back(mesh: Mesh, shop: str) -> None:
    principal = f"cluster.local/ns/{shop}/sa"
    mesh.apply(shop, authorization("no-x", "DENY", "b", f"{principal}/x"))
    mesh.await_policy("node2", f"{shop}/no-x")
    vip, address = mesh.vip(shop, "b"), mesh.address(shop, "b")
    command = ["python3", str(APPS / "call.py"), "--hold", vip, "80"]
    with mesh.background(shop, "a", *command) as held:
        held.await_output("echoed")
        with control_plane_down(mesh):
            for node in ("node1", "node2"):
                eventually(lambda n=node: not connected(mesh, n), 20, f"{node} to notice")
            # new connections, also of one that was never made before and has no cached answer
            assert mesh.call(shop, "a", vip).get("echoed") == "hello"
            assert mesh.call(shop, "b", mesh.address(shop, "a"), PORT).get("echoed") == "hello"
            # policies in force stay
            assert "error" in mesh.call(shop, "x", vip)
            assert "error" in mesh.call(shop, "x", address, PORT)
            # names
            text = mesh.exec(
                shop, "a", "python3", str(APPS / "resolve.py"), "--type", "A", f"b.{shop}.svc.cluster.local"
            )
            assert json.loads(text.strip().splitlines()[-1])["addresses"] == [vip]
            # a worker that dies now is replaced by one that knows as much
            parent = int((mesh.node_dir("node2") / "ztunnel.pid").read_text())
            worker = next(pid for pid, name in children(parent).items() if name == "ztunnel-w0")
            assert held.process.stdin is not None
            held.process.stdin.close()
            assert "again" in held.await_output("{"), "what is open goes on"
            os.kill(worker, signal.SIGKILL)
            assert mesh.call(shop, "a", vip).get("echoed") == "hello"
            assert "error" in mesh.call(shop, "x", vip)
            # a change is not known yet
            mesh.apply(shop, authorization("no-a", "DENY", "b", f"{principal}/a"))
            assert mesh.call(shop, "a", vip).get("echoed") == "hello"
        mesh.await_policy("node2", f"{shop}/no-a")
        assert "error" in mesh.call(shop, "a", vip)
        mesh.remove(shop, "authorizationpolicy", "no-a")
        mesh.await_policy("node2", f"{shop}/no-a", there=False)
        assert mesh.call(shop, "a", vip).get("echoed") == "hello"
    assert "error" in mesh.call(shop, "x", vip), "the other policy outlived all of it"


def test_load_goes_on_without_a_control_plane(mesh: Mesh, shop: str) -> None:
    for node in ("node1", "node2"):
        eventually(lambda n=node: connected(mesh, n), 20, f"{node} to be connected")
    with load(mesh, shop, "b", mesh.address(shop, "counted"), PORT) as running:
        with control_plane_down(mesh):
            running.mark()
            during = running.await_age(3.0)
        for node in ("node1", "node2"):
            eventually(lambda n=node: connected(mesh, n), 20, f"{node} to be connected again")
        last = running.finish()
    assert during["ok"] > 300
    assert (last["failed"], last["before"]["failed"], last["kept"]["lost"]) == (0, 0, 0), last
