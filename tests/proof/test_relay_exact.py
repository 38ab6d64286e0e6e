"""A thousand connections at once through both ztunnels: every byte, every end and every reset arrives as it was sent.

node1: a ----HBONE---- node2: b, driven by tests/proof/clients/exact.c, which checks on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from ambient.io.admin_client import ask
from ambient.lab.driver import eventually
from tests.support.clients import built
from tests.support.mesh import IDLE, PORT, Mesh, pod, service

pytestmark = [pytest.mark.lab, pytest.mark.net]

BYTES_MAX = 1_000_000
LIMIT_S = 50.0
SEED = 20_240_229
ENDS = ("both", "client_first", "server_first", "client_resets", "server_resets", "client_aborts")


@pytest.fixture(scope="module")
def pair(mesh: Mesh) -> Iterator[str]:
    with mesh.namespace(pod("a", "node1", command=IDLE), pod("b", "node2", command=IDLE), service("b")) as name:
        yield name


def relayed(mesh: Mesh, node: str) -> int:
    """How many connections a node's ztunnel has opened with mTLS so far, by its own metrics."""
    found = 0.0
    for line in ask(mesh.node_dir(node) / "ztunnel.sock", "/metrics").splitlines():
        if line.startswith("istio_tcp_connections_opened_total{") and 'policy="mutual_tls"' in line:
            found += float(line.rpartition(" ")[2])
    return int(found)


def run_exact(mesh: Mesh, pair: str, family: int, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the client and the server counted."""
    host = mesh.vip(pair, "b", family)
    drive = [built("exact"), "drive", host, "80", str(count), str(BYTES_MAX), str(SEED)]
    with mesh.background(pair, "b", built("exact"), "serve", str(PORT)) as server:
        server.await_output("listening")
        with mesh.background(pair, "a", *drive) as client:
            driven = json.loads(client.await_output('{"most"', LIMIT_S))
            print("\n".join(client.skipped[:5]))
        assert server.process.stdin is not None
        server.process.stdin.close()
        served = json.loads(server.await_output('{"most"', 15))
        print("\n".join(server.skipped[:5]))
    return driven, served


@pytest.mark.parametrize(("family", "count"), [(4, 1000), (6, 200)])
def test_every_byte_and_every_end_arrives_as_it_was_sent(mesh: Mesh, pair: str, family: int, count: int) -> None:
    before = {node: relayed(mesh, node) for node in ("node1", "node2")}
    driven, served = run_exact(mesh, pair, family, count)
    print(f"{count} connections over IPv{family}: client {driven}, server {served}")
    for side in (driven, served):
        assert (side["wrong"], side["early"], side["broken"], side["open"]) == (0, 0, 0, 0), (driven, served)
        assert sum(side[end] for end in ENDS) == count
        assert side["most"] == count, "all were open at the same time"
    assert all(driven[end] for end in ENDS), "every way to end was tried"
    assert driven["bytes_got"] > 10_000 * count and driven["bytes_sent"] > 10_000 * count
    # and they took the way through both ztunnels
    for node, was in before.items():
        eventually(lambda n=node, w=was: relayed(mesh, n) - w >= count, 5, f"{node} to count {count} connections")
