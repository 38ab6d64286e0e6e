"""An address that changes hands while the control plane is down: the old owner's rights do not pass to the new one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from ambient.lab.driver import eventually
from ambient.lab.sandbox import WISHED_ADDRESS
from tests.lab.meshed import MeshedLab

pytestmark = [pytest.mark.lab]


def pod(name: str, account: str, address: str = "") -> str:
    body: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": "shop",
            "labels": {"app": name},
            "annotations": {WISHED_ADDRESS: address} if address else {},
        },
        "spec": {
            "serviceAccountName": account,
            "nodeName": "node2",
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "main", "image": "shop", "command": ["python3", "catalog.py"]}],
        },
    }
    return json.dumps(body)


@pytest.fixture
def b(mesh: MeshedLab) -> Iterator[str]:
    """The address of pod b, which the client can reach."""
    mesh.apply(pod("b", "catalog"))
    mesh.await_mode("shop", True)
    address = mesh.address("shop", "b")
    eventually(lambda: mesh.get(f"http://{address}:8080/whoami").get("status") == 200, 10, "b to answer")
    yield address
    mesh.start("control")
    eventually(mesh.control_pid, 10, "the control plane")


def entries_of(mesh: MeshedLab, address: str) -> list[str]:
    """Every map entry of the destination's node that holds the address, or belongs to its pod."""
    names = ("workloads", "services", "listeners", "authorized", "origins", "enrolled", "redirects")
    rows = [(name, json.dumps(row)) for name in names for row in mesh.maps(name, 2)]
    return [f"{name}: {row}" for name, row in rows if f'"{address}' in row or "Pod/shop/b" in row]


def test_nothing_of_the_old_pod_is_left_when_its_address_is_given_to_another(mesh: MeshedLab, b: str) -> None:
    assert entries_of(mesh, b)
    mesh.stop("control")
    mesh.driver.kubectl("delete", "pod", "-n", "shop", "b", "--timeout=15s")
    assert entries_of(mesh, b) == []
    assert "error" in mesh.get(f"http://{b}:8080/whoami", timeout_s=4)
    mesh.apply(pod("c", "payments", b))
    record = eventually(lambda: mesh.pod_record("shop", "c") if c_runs(mesh) else None, 15, "c to run")
    assert record.addresses[0] == b
    # c has no certificate (the CA is down): callers that still know b must not reach it as b, nor in any other way
    assert "error" in mesh.get(f"http://{b}:8080/whoami", timeout_s=4)
    mesh.start("control")
    answer = eventually(
        lambda: (found := mesh.get(f"http://{b}:8080/whoami")).get("status") == 200 and found, 60, "c to answer"
    )
    assert answer["answer"]["local"] == b
    certificates = mesh.driver.rows("certificates", "--node", "node2")
    assert any("sa/payments" in json.dumps(row) for row in certificates)


def c_runs(mesh: MeshedLab) -> bool:
    from ambient.lab import record as records

    return any(p.name == "c" and p.namespace == "shop" for p in records.pods(records.read(mesh.name)))
