"""STRICT refuses what has no identity, masqueraded NodePort traffic included, and lets the kubelet's probes in."""

from __future__ import annotations

from typing import Any

import pytest

from ambient.lab.driver import eventually
from tests.lab.meshed import MeshedLab

pytestmark = [pytest.mark.lab]

STRICT = """
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: shop}
spec: {mtls: {mode: STRICT}}
"""


@pytest.fixture
def strict(mesh: MeshedLab) -> MeshedLab:
    assert mesh.get("http://frontend.shop/", pod="stranger", namespace="outside")["status"] == 200
    mesh.apply(STRICT)
    url = "http://catalog.shop/items"
    eventually(lambda: mesh.get(url, pod="stranger", namespace="outside").get("error"), 15, "STRICT to refuse")
    return mesh


def test_strict_refuses_plaintext_and_takes_callers_of_the_mesh(strict: MeshedLab) -> None:
    for app in ("frontend", "catalog", "cart", "payments"):
        refused = strict.get(f"http://{app}.shop/whoami", pod="stranger", namespace="outside")
        assert "error" in refused, app
        assert strict.get(f"http://{app}/whoami")["status"] == 200, app


def test_node_port_traffic_from_the_nodes_address_is_refused_while_probes_from_it_pass(strict: MeshedLab) -> None:
    node = strict.node(1)
    url = f"http://{node.address4}:30080/whoami"
    eventually(lambda: strict.get_from(strict.driver.lab.underlay_netns, url).get("error"), 5, "a refusal")
    assert "error" in strict.get_from(node.netns, url)
    assert "error" in strict.get_from(node.netns, f"http://{strict.address('shop', 'frontend')}:8080/whoami")
    before = strict.driver.pods("shop")
    # longer than it takes a failing probe to count: three times two seconds
    words = ("wait", "pod", "-n", "shop", "-l", "app in (frontend,catalog,cart,payments)")
    lost = strict.driver.kubectl(*words, "--for=condition=Ready=false", "--timeout=8s", check=False)
    assert "condition met" not in lost
    assert restarts(before) == restarts(strict.driver.pods("shop"))


def restarts(pods: dict[str, dict[str, Any]]) -> dict[str, int]:
    return {app: pod["status"]["containerStatuses"][0]["restartCount"] for app, pod in pods.items()}
