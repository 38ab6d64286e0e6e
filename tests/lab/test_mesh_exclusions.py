"""Pods that cannot be in the mesh stay out with a reason on them, and work; the mesh's own ports cannot be dialled."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ambient import ports
from ambient.lab.driver import eventually
from tests.lab.meshed import REDIRECTION, MeshedLab

pytestmark = [pytest.mark.lab]


def pod(name: str, command: list[str], annotations: dict[str, str] | None = None, **spec: Any) -> str:
    body = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop", "labels": {"app": name}, "annotations": annotations or {}},
        "spec": {
            "serviceAccountName": "client",
            "nodeName": "node1",
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "main", "image": "shop", "command": command}],
        }
        | spec,
    }
    return json.dumps(body)


def annotations(mesh: MeshedLab, name: str) -> dict[str, str]:
    found: dict[str, str] = mesh.driver.get("pod", "-n", "shop", name)["metadata"].get("annotations", {})
    return found


@pytest.mark.parametrize(
    ("manifest", "word"),
    [
        (pod("hosted", ["sleep", "infinity"], hostNetwork=True), "host"),
        (pod("sidecar", ["sleep", "infinity"], {"sidecar.istio.io/status": "{}"}), "sidecar"),
        (pod("router", ["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward; exec sleep infinity"]), "forward"),
        (pod("squatter", ["python3", "-m", "http.server", str(ports.HBONE)]), str(ports.HBONE)),
    ],
    ids=["host-network", "sidecar", "ip_forward", "mesh-port"],
)
def test_a_pod_that_cannot_be_in_the_mesh_says_why(mesh: MeshedLab, manifest: str, word: str) -> None:
    name = json.loads(manifest)["metadata"]["name"]
    late = name in ("router", "squatter")  # what they do is seen when they are enrolled while running
    if late:
        manifest = manifest.replace('"labels": {', '"labels": {"istio.io/dataplane-mode": "none", ')
    mesh.apply(manifest)
    eventually(lambda: mesh.driver.get("pod", "-n", "shop", name)["status"]["phase"] == "Running", 10, "the pod to run")
    if late:
        if name == "squatter":
            address = mesh.address("shop", name)
            eventually(lambda: mesh.get(f"http://{address}:{ports.HBONE}/", pod="stranger", namespace="outside")
                       .get("status"), 10, "its server")  # fmt: skip
        mesh.driver.kubectl("label", "pod", "-n", "shop", name, "istio.io/dataplane-mode-")
    reason = eventually(
        lambda: next((v for k, v in annotations(mesh, name).items() if "not-enrolled" in k), ""), 10, "a reason"
    )
    assert word in reason
    assert annotations(mesh, name).get(REDIRECTION) != "enabled"


@pytest.mark.parametrize("port", [ports.OUTBOUND, ports.INBOUND_PLAINTEXT, ports.HBONE])
def test_a_pod_cannot_use_the_meshs_ports_as_a_target(mesh: MeshedLab, port: int) -> None:
    for host in (mesh.address("shop", "payments"), "127.0.0.1", mesh.address("shop", "client")):
        assert "error" in mesh.get(f"http://{host}:{port}/", timeout_s=3)
