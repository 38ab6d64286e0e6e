"""Processes of the mesh are killed while connections within the node move bytes: none of those notices.

node1: a keeps connections to b (redirected) and to c (direct), both ways and request by request; every byte is checked
on both sides by tests/proof/clients/steady.c, which also does the killing and says what was open at that moment. New
connections go from a to d.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

import pytest

from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import FlowValue, TupleKey
from ambient.io.bpf_maps import Maps
from ambient.lab.driver import eventually
from ambient.manifest.acceleration import ACCELERATION
from tests.support.clients import children, load, load_server, steady, steady_server
from tests.support.kernel_path import await_kernel_path
from tests.support.mesh import IDLE, PORT, Mesh, pod
from tests.support.processes import is_back, pid_of, successor

pytestmark = [pytest.mark.lab, pytest.mark.net]

STEADY_PORT = 7100
BOTH_WAYS, ASKING = 60, 20
"""Connections of each kind to each server."""
PROBE = {"tcpSocket": {"port": PORT}, "periodSeconds": 1, "failureThreshold": 3}


@pytest.fixture(scope="module")
def maps(mesh: Mesh) -> Iterator[Maps]:
    with Maps.open(mesh.settings("node1").bpffs_dir) as found:
        yield found


@pytest.fixture(scope="module")
def trio(mesh: Mesh, maps: Maps) -> Iterator[str]:
    redirect, direct = ({"annotations": {ACCELERATION: word}} for word in ("redirect", "direct"))
    pods = [
        pod("a", command=IDLE, **redirect),
        pod("b", **redirect),
        pod("c", **direct),
        pod("d", command=load_server(), probe=PROBE, **redirect),
    ]
    with mesh.namespace(*pods) as name:
        for server in ("b", "c"):
            await_kernel_path(mesh, maps, name, mesh.address(name, server), PORT)
        yield name


def steady_flows(maps: Maps, addresses: set[str]) -> dict[TupleKey, FlowValue]:
    return {k: v for k, v in maps.flows.items() if k.local in addresses and k.local_port == STEADY_PORT}


def ends(flows: Iterable[TupleKey]) -> set[tuple[str, str]]:
    """Both ends of each, the client's first."""
    return {(f"{k.remote}:{k.remote_port}", f"{k.local}:{k.local_port}") for k in flows}


def redirected(flows: dict[TupleKey, FlowValue]) -> int:
    return sum(flow.client.redirect_bytes + flow.server.redirect_bytes for flow in flows.values())


def doomed(mesh: Mesh, role: str) -> list[int]:
    """Who is to be killed; the last one is killed by the client itself."""
    if role == "ztunnel":
        parent = pid_of(mesh, "node1", "parent")
        return [*children(parent), parent]
    return [pid_of(mesh, "node1", role)]


@pytest.mark.parametrize("role", ["worker", "control", "parent", "ztunnel", "agent", "holder"])
def test_a_kill_loses_no_byte_of_any_flow_and_leaves_the_maps_right(
    mesh: Mesh, maps: Maps, trio: str, role: str
) -> None:
    eventually(lambda: is_back(mesh, "node1"), 30, "node1 to be whole")
    b, c = (mesh.address(trio, name) for name in ("b", "c"))
    targets = [f"{address}:{STEADY_PORT}" for address in (b, c)]
    with ExitStack() as stack:
        servers = [stack.enter_context(steady_server(mesh, trio, name, STEADY_PORT)) for name in ("b", "c")]
        both = stack.enter_context(steady(mesh, trio, "a", "d", *targets, count=BOTH_WAYS))
        asking = stack.enter_context(steady(mesh, trio, "a", "e", *targets, count=ASKING))
        new = stack.enter_context(load(mesh, trio, "a", mesh.address(trio, "d"), PORT, rate=100, kept=2))
        clients = (both, asking)
        connections = both.ends() | asking.ends()
        assert len(connections) == 2 * (BOTH_WAYS + ASKING)

        def flows() -> dict[TupleKey, FlowValue]:
            return steady_flows(maps, {b, c})

        before = flows()
        assert ends(before) == connections, "all of them are the kernel's"
        wanted = {b: LAYOUT["ACCELERATION_REDIRECT"], c: LAYOUT["ACCELERATION_DIRECT"]}
        assert all(flow.acceleration == wanted[key.local] for key, flow in before.items())
        eventually(lambda: redirected(flows()) > 1_000_000, 10, "bytes to be redirected")
        eventually(lambda: both.report()["moving"] == 2 * BOTH_WAYS, 5, "all to move")

        new.mark()
        *first, last = doomed(mesh, role)
        for pid in first:
            os.kill(pid, signal.SIGKILL)
        at = both.kill(last)
        moved = redirected(flows())
        assert at["open"] == at["moving"] >= 100, at
        assert asking.report()["open"] == 2 * ASKING
        successor(mesh, "node1", "parent" if role == "ztunnel" else role, last)
        eventually(lambda: is_back(mesh, "node1"), 30, "node1 to be whole again")

        # the maps are right
        assert ends(flows()) == connections
        eventually(lambda: not mesh.rows("diff", "--node", "node1"), 15, "no drift")
        # and everything goes on: redirected, direct, and what is new
        assert redirected(flows()) > moved + 500_000
        for client, count in ((both, 2 * BOTH_WAYS), (asking, 2 * ASKING)):
            now = client.report()
            assert (now["open"], now["moving"], now["lost"], now["wrong"]) == (count, count, 0, 0), (now, client.said)
        new.await_ok(100, 10)
        fresh = new.finish()
        assert (fresh["failed"], fresh["kept"]["lost"], fresh["before"]["failed"]) == (0, 0, 0), fresh
        assert fresh["ok"] == fresh["started"] >= 100

        # to the last byte
        said = [client.finish() for client in clients]
        eventually(lambda: not any(server.report()["open"] for server in servers), 5, "the servers to see the ends")
        heard = [server.report() for server in servers]
        print(f"{role}: {at}\n{said}\n{heard}\nnew: {fresh}")
        for one in (*said, *heard):
            assert (one["lost"], one["wrong"], one["open"], one["enomem"]) == (0, 0, 0, 0), (one, both.said)
        assert sum(e["sent"] for e in said) == sum(h["got"] for h in heard)
        assert sum(e["got"] for e in said) == sum(h["sent"] for h in heard)
    eventually(lambda: not flows(), 10, "the flows to end")
