"""Names are answered by the node's own resolver without the application knowing; every connection is counted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from ambient.io.admin_client import ask
from ambient.lab.driver import eventually
from ambient.lab.topology import DNS4
from tests.support.mesh import APPS, Mesh, pod, service

pytestmark = [pytest.mark.lab, pytest.mark.net]

WAYS = [[], ["--unconnected"], ["--tcp"]]


@pytest.fixture(scope="module")
def pods(mesh: Mesh) -> Iterator[str]:
    objects = [
        pod("a", "node1"),
        pod("b", "node2"),
        service("b"),
        service("each", "b", clusterIP="None"),
    ]
    with mesh.namespace(*objects) as name:
        yield name


def resolve(mesh: Mesh, namespace: str, name: str, *options: str) -> dict[str, Any]:
    text = mesh.exec(namespace, "a", "python3", str(APPS / "resolve.py"), *options, name, check=False)
    found: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    return found


def metric(mesh: Mesh, node: str, name: str, **labels: str) -> float:
    """The sum of the samples of a metric that have these labels."""
    total = 0.0
    for line in ask(mesh.node_dir(node) / "ztunnel.sock", "/metrics").splitlines():
        match = re.fullmatch(rf"{name}(?:{{(.*)}})? (\S+)", line)
        if match and all(f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()):
            total += float(match[2])
    return total


def dns_requests(mesh: Mesh) -> float:
    return metric(mesh, "node1", "istio_dns_requests_total")


@pytest.mark.parametrize("way", WAYS, ids=["connected", "unconnected", "tcp"])
@pytest.mark.parametrize("family", [4, 6])
def test_a_service_is_answered_by_the_nodes_resolver(mesh: Mesh, pods: str, way: list[str], family: int) -> None:
    before = dns_requests(mesh)
    kind = "A" if family == 4 else "AAAA"
    found = resolve(mesh, pods, f"b.{pods}.svc.cluster.local", "--type", kind, *way)
    assert (found.get("addresses"), found.get("code")) == ([mesh.vip(pods, "b", family)], 0), found
    assert found["peer"] == [DNS4, 53], "the application sees the server it asked"
    assert dns_requests(mesh) > before


def test_a_headless_service_is_its_pods(mesh: Mesh, pods: str) -> None:
    assert resolve(mesh, pods, f"each.{pods}.svc.cluster.local")["addresses"] == [mesh.address(pods, "b")]


def test_a_short_name_is_found_through_the_search_list(mesh: Mesh, pods: str) -> None:
    assert mesh.call(pods, "a", "b").get("echoed") == "hello"


def test_a_name_nobody_knows_is_asked_upstream_and_does_not_exist(mesh: Mesh, pods: str) -> None:
    before = metric(mesh, "node1", "istio_dns_upstream_requests_total")
    found = resolve(mesh, pods, "nobody.example.")
    assert (found["addresses"], found["code"]) == ([], 3)
    assert metric(mesh, "node1", "istio_dns_upstream_requests_total") > before


def test_an_unenrolled_pod_asks_the_clusters_server_itself(mesh: Mesh, pods: str) -> None:
    with mesh.namespace(pod("a", "node1"), enrolled=False) as outside:
        before = dns_requests(mesh)
        found = resolve(mesh, outside, f"b.{pods}.svc.cluster.local")
        assert found["addresses"] == [mesh.vip(pods, "b")]
        assert dns_requests(mesh) == before


def test_connections_and_bytes_are_counted_on_both_sides_under_istios_names(mesh: Mesh, pods: str) -> None:
    common = {
        "source_workload": "a",
        "source_workload_namespace": pods,
        "source_principal": f"spiffe://cluster.local/ns/{pods}/sa/a",
        "destination_workload": "b",
        "destination_principal": f"spiffe://cluster.local/ns/{pods}/sa/b",
        "destination_service": f"b.{pods}.svc.cluster.local",
        "destination_service_name": "b",
        "connection_security_policy": "mutual_tls",
        "request_protocol": "tcp",
    }

    def counted(node: str, name: str, reporter: str) -> float:
        return metric(mesh, node, f"istio_tcp_{name}_total", reporter=reporter, **common)

    sides = (("node1", "source"), ("node2", "destination"))
    before = {s: [counted(*s[:1], n, s[1]) for n in ("connections_opened", "sent_bytes")] for s in sides}
    text = "x" * 12345
    found = mesh.call(pods, "a", mesh.vip(pods, "b"), 80, "--text", text)
    assert found.get("echoed") == text
    for node, reporter in sides:

        def grown(node: str = node, reporter: str = reporter) -> bool:
            opened, sent = before[(node, reporter)]
            return (
                counted(node, "connections_opened", reporter) == opened + 1
                and counted(node, "sent_bytes", reporter) == sent + len(text)
                and counted(node, "connections_closed", reporter) == counted(node, "connections_opened", reporter)
            )

        eventually(grown, 5, f"{reporter} to count one connection and {len(text)} bytes exactly")


def test_connections_shows_both_ends_while_they_are_open(mesh: Mesh, pods: str) -> None:
    command = ["python3", str(APPS / "call.py"), "--hold", mesh.vip(pods, "b"), "80"]
    with mesh.background(pods, "a", *command) as held:
        held.await_output("echoed")
        rows = mesh.rows("connections")
        mine = {(r["node"], r["direction"]): r for r in rows if f"{pods}/" in r["workload"]}
        assert set(mine) == {("node1", "Outbound"), ("node2", "Inbound")}
        assert {r["protocol"] for r in mine.values()} == {"HBONE"}
        redirects = [r for r in mesh.rows("maps", "redirects", "--node", "node1") if r["source"] == f"{pods}/a"]
        assert [r["original"] for r in redirects] == [f"{mesh.vip(pods, 'b')}:80"]
    eventually(
        lambda: not [r for r in mesh.rows("connections") if f"{pods}/" in r["workload"]], 5, "the connection to go"
    )


def test_the_commands_show_what_the_mesh_knows(mesh: Mesh, pods: str) -> None:
    workloads = {r["pod_name"]: r for r in mesh.rows("workloads") if r["namespace"] == pods}
    assert {name: r["protocol"] for name, r in workloads.items()} == {"a": "HBONE", "b": "HBONE"}
    services = {r["service_name"]: r for r in mesh.rows("services") if r["namespace"] == pods}
    assert services["b"]["endpoints"] == "1/1"
    assert mesh.vip(pods, "b") in services["b"]["service_vip"]
    leaves = {r["certificate_name"] for r in mesh.rows("certificates") if r["type"] == "Leaf" and r["valid_cert"]}
    assert {f"spiffe://cluster.local/ns/{pods}/sa/{n}" for n in "ab"} <= leaves
    table = {(r["node"], r["name"]): r for r in mesh.rows("maps")}
    assert table[("node1", "enrolled")]["entries"] >= 1
    assert {r["address4"] for r in mesh.rows("maps", "enrolled", "--node", "node2")} >= {mesh.address(pods, "b")}
    assert f"{mesh.address(pods, 'b')}" in {r["address"] for r in mesh.rows("maps", "workloads", "--node", "node1")}
