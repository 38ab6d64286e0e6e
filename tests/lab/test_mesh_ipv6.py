"""IPv6 end to end: pod addresses, dual-stack services, and both ends' views, on both nodes."""

from __future__ import annotations

import pytest

from ambient import ports
from ambient.lab.driver import eventually
from tests.lab.meshed import MeshedLab

pytestmark = [pytest.mark.lab]

SIX = """
apiVersion: v1
kind: Service
metadata: {name: TARGET-six, namespace: shop}
spec:
  ipFamilyPolicy: SingleStack
  ipFamilies: [IPv6]
  selector: {app: TARGET}
  ports: [{port: 80, targetPort: 8080}]
"""


@pytest.mark.parametrize("target", ["payments", "cart"])
def test_a_pods_ipv6_address_is_reached_through_the_tunnel(mesh: MeshedLab, target: str) -> None:
    address = mesh.address("shop", target, 6)
    with mesh.driver.capture() as wire:
        answer = mesh.get(f"http://[{address}]:8080/whoami")
    assert answer["answer"]["client"] == mesh.address("shop", "client", 6) == answer["local"]
    assert answer["peer"] == answer["answer"]["local"] == address
    assert not any(8080 in segment.ports for segment in wire.segments)
    if target == "payments":
        assert any(ports.HBONE in segment.ports and ":" in str(segment.source) for segment in wire.segments)


def test_an_ipv6_service_is_reached_through_the_tunnel(mesh: MeshedLab) -> None:
    mesh.apply(SIX.replace("TARGET", "payments"))
    vip = mesh.driver.get("service", "-n", "shop", "payments-six")["spec"]["clusterIP"]
    assert ":" in vip
    answer = eventually(
        lambda: (found := mesh.get("http://payments-six/whoami")).get("status") == 200 and found, 10, "an answer"
    )
    assert answer["peer"] == vip
    assert answer["answer"]["client"] == mesh.address("shop", "client", 6)


def test_an_ipv6_client_outside_the_mesh_is_seen_at_its_own_address(mesh: MeshedLab) -> None:
    address = mesh.address("shop", "catalog", 6)
    answer = mesh.get(f"http://[{address}]:8080/whoami", pod="stranger", namespace="outside")
    assert answer["answer"]["client"] == mesh.address("outside", "stranger", 6)
