"""An address given to another pod: nothing of the first pod is left, and the second is reachable only as itself.

With the control plane stopped, nobody tells the peers that the address changed hands: what protects them is the
identity they demand, and on the node the CNI plugin, which forgets an address before it can be given away.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import pytest

from ambient.lab.driver import eventually
from ambient.lab.sandbox import WISHED_ADDRESS
from tests.support.mesh import PORT, Mesh, is_ready, pod, service

pytestmark = [pytest.mark.lab, pytest.mark.net]


@pytest.fixture
def pods(mesh: Mesh) -> Iterator[str]:
    with mesh.namespace(pod("a", "node1"), pod("b", "node2"), service("b")) as name:
        yield name


@pytest.fixture
def control_stopped(mesh: Mesh) -> Iterator[None]:
    """The control plane does not run on, while the API server does."""
    rows = json.loads(mesh.ambient("lab", "status", "--name", mesh.lab.name, "-o", "json"))
    pid = next(r["pid"] for r in rows if r["kind"] == "control")
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def entries(mesh: Mesh, address: str) -> dict[str, list[dict[str, object]]]:
    """What node2's kernel maps hold of an address."""
    fields = {
        "workloads": ("address",),
        "enrolled": ("address4", "address6"),
        "listeners": ("pod_address",),
        "authorized": ("local", "remote"),
        "origins": ("local", "remote"),
    }
    return {
        name: [
            row
            for row in mesh.rows("maps", name, "--node", "node2")
            if any(str(row[f]).rpartition(":")[0] == address or row[f] == address for f in keys)
        ]
        for name, keys in fields.items()
    }


def test_an_address_that_changes_hands_never_carries_the_old_identity(
    mesh: Mesh, pods: str, request: pytest.FixtureRequest
) -> None:
    address = mesh.address(pods, "b")
    assert mesh.call(pods, "a", mesh.vip(pods, "b")).get("echoed") == "hello"
    before = entries(mesh, address)
    assert before["workloads"] and before["enrolled"] and before["listeners"]

    request.getfixturevalue("control_stopped")
    mesh.kubectl("delete", "pod", "b", "-n", pods)
    assert entries(mesh, address) == {name: [] for name in before}

    mesh.kubectl("create", "serviceaccount", "c", "-n", pods)
    mesh.apply(pods, pod("c", "node2", annotations={WISHED_ADDRESS: address}))
    eventually(lambda: is_ready(mesh.get("pod", "c", "-n", pods)), 40, "c to run")
    assert mesh.address(pods, "c") == address
    after = entries(mesh, address)
    assert [row["workload"] for row in after["enrolled"]] == [f"{pods}/c"]
    assert after["workloads"][0]["generation"] != before["workloads"][0]["generation"]

    # b's caller demands b, and c has no certificate at all: refused by name and by address
    assert "error" in mesh.call(pods, "a", mesh.vip(pods, "b"), 80)
    assert "error" in mesh.call(pods, "a", address, PORT)
    certificates = {r["certificate_name"]: r for r in mesh.rows("certificates", "--node", "node2")}
    mine = certificates.get(f"spiffe://cluster.local/ns/{pods}/sa/c")
    assert mine is None or not mine["valid_cert"], mine


def test_once_the_control_plane_is_back_the_new_pod_is_reachable_as_itself(mesh: Mesh, pods: str) -> None:
    address = mesh.address(pods, "b")
    mesh.kubectl("delete", "pod", "b", "-n", pods)
    mesh.kubectl("create", "serviceaccount", "c", "-n", pods)
    mesh.apply(pods, pod("c", "node2", annotations={WISHED_ADDRESS: address}))
    mesh.await_ready(pods, {"c"}, enrolled=True)

    def reached() -> bool:
        return mesh.call(pods, "a", address, PORT).get("echoed") == "hello"

    eventually(reached, 20, "a to reach c at b's address")
    assert f"spiffe://cluster.local/ns/{pods}/sa/c" in mesh.log("node1")
