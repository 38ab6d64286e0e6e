"""AuthorizationPolicy in a whole lab: who is denied, what is logged, and what happens to open connections."""

from __future__ import annotations

import pytest

from ambient.lab.driver import eventually
from tests.lab.meshed import MeshedLab

pytestmark = [pytest.mark.lab]

DENY = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-client, namespace: shop}
spec:
  selector: {matchLabels: {app: TARGET}}
  action: DENY
  rules:
  - from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}]
"""
HOLD = """
import http.client, sys
connection = http.client.HTTPConnection(sys.argv[1], timeout=15)
connection.request("GET", "/whoami")
response = connection.getresponse()
response.read()
print("answered", response.status, flush=True)
try:
    print("end" if connection.sock.recv(1) == b"" else "more", flush=True)
except ConnectionResetError:
    print("reset", flush=True)
except TimeoutError:
    print("open", flush=True)
"""


@pytest.mark.parametrize(("target", "node"), [("catalog", 2), ("cart", 1)])
def test_a_denied_caller_is_reset_and_logged_by_the_policys_name_and_another_is_not(
    mesh: MeshedLab, target: str, node: int
) -> None:
    path = {"catalog": "/items", "cart": "/checkout?price=1"}[target]
    assert mesh.get(f"http://{target}{path}")["status"] == 200
    mesh.apply(DENY.replace("TARGET", target))
    denied = eventually(lambda: mesh.get(f"http://{target}{path}").get("error"), 10, "a refusal")
    assert "reset" in denied
    log = mesh.log(f"node{node}")
    assert any("shop/no-client" in line and "sa/client" in line for line in log.splitlines())
    assert mesh.get(f"http://{target}{path}", pod="deploy/frontend")["status"] == 200
    mesh.restore()
    eventually(lambda: mesh.get(f"http://{target}{path}").get("status") == 200, 10, "the policy to go")


@pytest.mark.parametrize("target", ["catalog", "cart"])
def test_an_open_connection_that_lost_its_right_is_closed_at_once(mesh: MeshedLab, target: str) -> None:
    with mesh.driver.background("shop", "client", "python3", "-c", HOLD, target) as held:
        held.await_output("answered 200")
        mesh.apply(DENY.replace("TARGET", target))
        held.await_output("reset")


def test_a_policy_that_cannot_be_read_is_reported_on_its_status(mesh: MeshedLab) -> None:
    mesh.apply(
        """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: broken, namespace: shop}
spec: {action: DENY, rules: [{from: [{source: {ipBlocks: ["999.1.2.3"]}}]}]}
"""
    )

    def told() -> str:
        status = mesh.driver.get("authorizationpolicies.security.istio.io", "-n", "shop", "broken").get("status", {})
        return " ".join(f"{c['status']} {c.get('message', '')}" for c in status.get("conditions", ()))

    assert "999.1.2.3" in eventually(told, 10, "a condition on the policy")
