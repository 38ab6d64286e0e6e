"""STRICT, probes and what comes from the node's own address.

A NodePort connection is masqueraded to the node's address, exactly like a kubelet probe: address tells nothing,
so probes are known by the socket that makes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

import pytest

from ambient.io import cgroup
from ambient.lab.driver import eventually
from tests.support.mesh import APPS, PORT, STRICT, Mesh, authorization, is_ready, pod, service

pytestmark = [pytest.mark.lab, pytest.mark.net]

PROBE = {"tcpSocket": {"port": PORT}, "periodSeconds": 1, "failureThreshold": 1}


@pytest.fixture(scope="module")
def shop(mesh: Mesh) -> Iterator[str]:
    objects = [pod("a", "node1"), pod("b", "node2", probe=PROBE), service("b"), service("door", "b", type="NodePort")]
    with mesh.namespace(*objects) as name:
        yield name


@pytest.fixture(scope="module")
def stranger(mesh: Mesh) -> Iterator[str]:
    with mesh.namespace(pod("stranger", "node1"), enrolled=False) as name:
        yield name


@pytest.fixture
def strict(mesh: Mesh, shop: str) -> Iterator[None]:
    mesh.apply(shop, STRICT)
    mesh.await_policy("node2", "istio-system/istio_converted_static_strict")
    eventually(
        lambda: any(
            w["namespace"] == shop and w["name"] == "b" and w["authorizationPolicies"]
            for w in mesh.dump("node2")["workloads"]
        ),
        10,
        "b to carry the strict policy",
    )
    yield
    mesh.remove(shop, "peerauthentication", "strict")
    eventually(
        lambda: not any(w["namespace"] == shop and w["authorizationPolicies"] for w in mesh.dump("node2")["workloads"]),
        10,
        "the strict policy to go",
    )


def from_underlay(mesh: Mesh, address: str, port: int) -> str:
    """A plain TCP connection from outside the cluster: the first line of the echo server, or the error."""
    program = (
        "import socket,sys\n"
        "try:\n"
        f" s=socket.create_connection(({address!r},{port}),4); s.settimeout(4); print(s.makefile().readline())\n"
        "except OSError as e: print('error',e)\n"
    )
    return mesh.run(["ip", "netns", "exec", mesh.lab.underlay_netns, "python3", "-c", program]).strip()


def node_port(mesh: Mesh, namespace: str) -> int:
    return int(mesh.get("service", "door", "-n", namespace)["spec"]["ports"][0]["nodePort"])


def test_permissive_takes_plaintext_from_a_stranger_and_from_a_node_port(mesh: Mesh, shop: str, stranger: str) -> None:
    found = mesh.call(stranger, "stranger", mesh.vip(shop, "b"))
    assert found.get("echoed") == "hello", found
    assert found["seen"]["peer"][0].removeprefix("::ffff:") == mesh.address(stranger, "stranger")
    assert '"pod"' in from_underlay(mesh, mesh.plan("node2").address4, node_port(mesh, shop))


def test_strict_refuses_plaintext_by_every_way_and_takes_mtls(
    mesh: Mesh, shop: str, stranger: str, strict: None
) -> None:
    assert "error" in mesh.call(stranger, "stranger", mesh.vip(shop, "b"))
    assert "error" in mesh.call(stranger, "stranger", mesh.address(shop, "b"), PORT)
    assert "error" in mesh.call(stranger, "stranger", mesh.address(shop, "b", 6), PORT)
    assert mesh.call(shop, "a", mesh.vip(shop, "b")).get("echoed") == "hello"


def test_masqueraded_node_port_traffic_is_refused_by_strict_while_probes_pass(
    mesh: Mesh, shop: str, strict: None
) -> None:
    before = mesh.rows("maps", "counters", "--node", "node2")
    for node in ("node1", "node2"):
        said = from_underlay(mesh, mesh.plan(node).address4, node_port(mesh, shop))
        assert '"pod"' not in said, said
    count = {row["reason"]: row["count"] for row in before}.get("probe", 0)
    eventually(
        lambda: (
            {r["reason"]: r["count"] for r in mesh.rows("maps", "counters", "--node", "node2")}.get("probe", 0)
            > count + 2
        ),
        10,
        "three more probes to be let through",
    )
    assert is_ready(mesh.get("pod", "b", "-n", shop))


def test_a_process_of_the_node_that_is_not_the_kubelet_is_no_probe(mesh: Mesh, shop: str, strict: None) -> None:
    """Same namespace and same source address as the kubelet's probes, and below the node's cgroup: another one."""
    program = (
        "import socket\n"
        "try:\n"
        f" s=socket.create_connection(({mesh.address(shop, 'b')!r},{PORT}),4); s.settimeout(4)\n"
        " print(s.makefile().readline())\n"
        "except OSError as e: print('error',e)\n"
    )
    plan = mesh.plan("node2")

    def said(group: PurePosixPath) -> str:
        procs = cgroup.mount_point() / group / "cgroup.procs"
        script = f'echo $$ > {procs} && exec ip netns exec {plan.netns} python3 -c "$0"'
        return mesh.run(["sh", "-c", script, program])

    assert '"pod"' not in said(plan.agent_cgroup)
    assert '"pod"' in said(plan.kubelet_cgroup), "the same program in the kubelet's cgroup is let through"


def test_policies_decide_by_principal_and_name_themselves_in_the_log(mesh: Mesh, shop: str) -> None:
    mesh.apply(shop, authorization("no-a", "DENY", "b", f"cluster.local/ns/{shop}/sa/a"))
    try:
        mesh.await_policy("node2", f"{shop}/no-a")
        assert "error" in mesh.call(shop, "a", mesh.vip(shop, "b"))
        eventually(lambda: f"{shop}/no-a" in mesh.log("node2"), 5, "the policy's name in the log")
        # another identity is not concerned
        assert mesh.call(shop, "b", mesh.address(shop, "b"), PORT).get("echoed") == "hello"
    finally:
        mesh.remove(shop, "authorizationpolicy", "no-a")
        mesh.await_policy("node2", f"{shop}/no-a", there=False)
    assert mesh.call(shop, "a", mesh.vip(shop, "b")).get("echoed") == "hello"


def test_a_connection_that_lost_its_right_is_closed(mesh: Mesh, shop: str) -> None:
    command = ["python3", str(APPS / "call.py"), "--hold", mesh.vip(shop, "b"), "80"]
    with mesh.background(shop, "a", *command) as held:
        held.await_output("echoed")
        mesh.apply(shop, authorization("no-a", "DENY", "b", f"cluster.local/ns/{shop}/sa/a"))
        try:
            mesh.await_policy("node2", f"{shop}/no-a")
            eventually(lambda: "policy change" in mesh.log("node2"), 5, "the log to say why")
            assert held.process.stdin is not None
            held.process.stdin.close()
            assert "error" in held.await_output("{")
        finally:
            mesh.remove(shop, "authorizationpolicy", "no-a")
            mesh.await_policy("node2", f"{shop}/no-a", there=False)


def test_a_connection_that_keeps_its_right_stays(mesh: Mesh, shop: str) -> None:
    command = ["python3", str(APPS / "call.py"), "--hold", mesh.vip(shop, "b"), "80"]
    with mesh.background(shop, "a", *command) as held:
        held.await_output("echoed")
        mesh.apply(shop, authorization("no-x", "DENY", "b", f"cluster.local/ns/{shop}/sa/x"))
        try:
            mesh.await_policy("node2", f"{shop}/no-x")
            assert held.process.stdin is not None
            held.process.stdin.close()
            assert "again" in held.await_output("{")
        finally:
            mesh.remove(shop, "authorizationpolicy", "no-x")
            mesh.await_policy("node2", f"{shop}/no-x", there=False)
