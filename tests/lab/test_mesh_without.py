"""Without parts of the mesh: un-enrolled pods never notice, pods of the mesh fail closed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ambient.lab import mesh as mesh_files
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


OUTSIDE = """
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: outside, labels: {app: web}}
spec:
  serviceAccountName: stranger
  nodeName: node2
  terminationGracePeriodSeconds: 1
  containers: [{name: main, image: shop, command: [python3, catalog.py]}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: outside}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
"""


@pytest.fixture
def stopped(mesh: MeshedLab) -> Iterator[MeshedLab]:
    """Agent, holder and ztunnel of both nodes are stopped."""
    mesh.apply(OUTSIDE)
    eventually(
        lambda: mesh.get("http://web/items", pod="stranger", namespace="outside").get("status") == 200, 15, "web"
    )
    for node in (1, 2):
        mesh.stop(mesh.node(node).name)
    yield mesh
    for node in (1, 2):
        mesh.start(mesh.node(node).name)
    eventually(lambda: mesh.get("http://catalog/items").get("status") == 200, 30, "the mesh to be back")


def test_pods_outside_the_mesh_work_with_the_agents_stopped_and_pods_of_the_mesh_fail_closed(
    stopped: MeshedLab,
) -> None:
    for url in ("http://web/items", f"http://{stopped.address('outside', 'web')}:8080/items"):
        assert stopped.get(url, pod="stranger", namespace="outside")["status"] == 200
    url = f"http://[{stopped.address('outside', 'web', 6)}]:8080/items"
    assert stopped.get(url, pod="stranger", namespace="outside")["status"] == 200
    assert "error" in stopped.get("http://catalog/items", timeout_s=3)
    assert "error" in stopped.get("http://catalog.shop/items", pod="stranger", namespace="outside", timeout_s=3)


def test_without_the_plugin_no_pod_starts_and_the_reason_is_shown(mesh: MeshedLab) -> None:
    plugin: Path = mesh_files.files_of(mesh.node(2)).cni_bin / mesh_files.CNI_STUB
    aside = plugin.with_name("aside")
    plugin.rename(aside)
    try:
        mesh.apply(pod("late", "catalog"))

        def message() -> str:
            item = mesh.driver.get("pod", "-n", "shop", "late")
            return str(item["status"]["containerStatuses"][0]["state"]["waiting"]["message"])

        assert "failed to find plugin 'ambient-cni'" in eventually(message, 10, "the reason")
    finally:
        aside.rename(plugin)
    mesh.await_mode("shop", True)
    assert mesh.get(f"http://{mesh.address('shop', 'late')}:8080/items")["status"] == 200
