"""Two nodes on one kernel never see each other's connections: maps, commands, telemetry, closing are each node's own.

Once with the two nodes of a lab; once with nodes of two labs whose pods have the same addresses and whose connections
have the same ports, so that only the place tells them apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from ambient.io.admin_client import ask
from ambient.lab.driver import eventually
from ambient.lab.sandbox import WISHED_ADDRESS
from ambient.manifest.acceleration import ACCELERATION
from tests.support.clients import Steady, load, load_server, steady, steady_server
from tests.support.mesh import IDLE, PORT, Mesh, authorization, pod
from tests.support.upgrade import CopiedMesh

pytestmark = [pytest.mark.lab, pytest.mark.net]

STEADY_PORT = 7120
FLOWS = 20
FEW_PORTS, MANY_PORTS = "40000 40023", "32768 60999"
"""Of 24 ports two times 20 have at least 16 in common."""
ADDRESSES = {"a": "10.244.1.210", "b": "10.244.1.211"}
PROBE = {"tcpSocket": {"port": PORT}, "periodSeconds": 1, "failureThreshold": 3}


@dataclass(frozen=True)
class Side:
    """A client and a server on one node."""

    mesh: Mesh
    node: str
    namespace: str
    client: str
    server: str

    @property
    def target(self) -> str:
        return f"{self.mesh.address(self.namespace, self.server)}:{STEADY_PORT}"

    def rows(self, *words: str) -> list[dict[str, object]]:
        """What this node shows of connections to the steady port, whosever they are."""
        return [row for row in self.mesh.rows(*words, "--node", self.node) if f":{STEADY_PORT}" in str(row)]

    def count(self, *reasons: str) -> int:
        rows = self.mesh.rows("maps", "counters", "--node", self.node)
        return sum(int(row["count"]) for row in rows if row["reason"] in reasons)

    def redirected(self) -> int:
        return sum(
            int(str(r["sent_redirected"])) + int(str(r["received_redirected"])) for r in self.rows("maps", "flows")
        )

    def connect_from(self, ports: str) -> None:
        text = f"echo {ports} > /proc/sys/net/ipv4/ip_local_port_range"
        self.mesh.exec(self.namespace, self.client, "sh", "-c", text)

    def metrics(self) -> str:
        return ask(self.mesh.node_dir(self.node) / "ztunnel.sock", "/metrics")

    def names(self) -> tuple[str, str]:
        return f"{self.namespace}/{self.client}", f"{self.namespace}/{self.server}"

    def log_lines(self) -> list[str]:
        """Of connections to the steady port that ended."""
        lines = self.mesh.log(self.node).splitlines()
        return [line for line in lines if "connection complete" in line and f":{STEADY_PORT}" in line]

    def is_named_in(self, line: str) -> bool:
        return f'src.workload="{self.client}" src.namespace="{self.namespace}"' in line

    def sees_only_itself(self) -> bool:
        """The maps, and what the commands make of them."""
        flows, sockets, shown = self.rows("maps", "flows"), self.rows("maps", "sockets"), self.rows("flows")
        if (len(flows), len(sockets), len(shown)) != (FLOWS, 2 * FLOWS, FLOWS):
            return False
        for row in (*flows, *shown):
            assert (row["source"], row["destination"]) == self.names(), row
        return True


@pytest.fixture
def nodes(mesh: Mesh) -> Iterator[tuple[Side, Side]]:
    """The two nodes of a lab."""
    words = {"annotations": {ACCELERATION: "redirect"}}
    pods = [
        made
        for n in (1, 2)
        for made in (
            pod(f"a{n}", f"node{n}", command=IDLE, **words),
            pod(f"b{n}", f"node{n}", command=load_server(), probe=PROBE, **words),
        )
    ]
    with mesh.namespace(*pods) as name:
        yield Side(mesh, "node1", name, "a1", "b1"), Side(mesh, "node2", name, "a2", "b2")


@pytest.fixture
def labs(mesh: Mesh, neighbour: CopiedMesh) -> Iterator[tuple[Side, Side]]:
    """The first nodes of two labs; pods of the same names and addresses."""
    with ExitStack() as stack:
        sides = []
        for one in (mesh, neighbour):
            wished = {n: {"annotations": {ACCELERATION: "redirect", WISHED_ADDRESS: a}} for n, a in ADDRESSES.items()}
            pods = [
                pod("a", command=IDLE, **wished["a"]),
                pod("b", command=load_server(), probe=PROBE, **wished["b"]),
            ]
            name = stack.enter_context(one.namespace(*pods))
            assert {n: one.address(name, n) for n in ADDRESSES} == ADDRESSES
            sides.append(Side(one, "node1", name, "a", "b"))
            sides[-1].connect_from(FEW_PORTS)
        yield sides[0], sides[1]


def ports(client: Steady) -> set[str]:
    return {own.rpartition(":")[2] for own, _ in client.ends()}


@pytest.mark.parametrize("where", ["nodes", "labs"])
def test_neither_sees_counts_tells_or_ends_what_is_the_others(where: str, request: pytest.FixtureRequest) -> None:
    ours, theirs = request.getfixturevalue(where)
    with ExitStack() as stack:
        for side in (ours, theirs):
            await_kernel_path(side)
            stack.enter_context(steady_server(side.mesh, side.namespace, side.server, STEADY_PORT))
        moving = stack.enter_context(
            steady(ours.mesh, ours.namespace, ours.client, "d", ours.target, count=FLOWS, pause_us=10000)
        )
        resting = stack.enter_context(
            steady(theirs.mesh, theirs.namespace, theirs.client, "e", theirs.target, count=FLOWS, pause_us=50_000_000)
        )
        common = ports(moving) & ports(resting)
        print(f"{where}: {len(common)} connections with the same ports on both")
        assert where == "nodes" or len(common) >= 16
        for side in (ours, theirs):
            eventually(side.sees_only_itself, 15, f"the connections of {side.node}")

        # one moves, the other's accounts rest; one connects, the other's hooks count nothing
        eventually(lambda: not theirs.rows("maps", "authorized"), 5, "nothing to be on its way")
        rest, count = theirs.redirected(), theirs.count("kernel", "captured", "authorized", "steered")
        before = ours.redirected()
        target = ours.mesh.address(ours.namespace, ours.server)
        ours.connect_from(MANY_PORTS)
        with load(ours.mesh, ours.namespace, ours.client, target, PORT, rate=100, kept=0) as new:
            for _ in range(3):
                assert not theirs.mesh.rows("maps", "authorized", "--node", theirs.node)
            found = new.await_ok(100, 10)
            assert found["failed"] == 0, found
            new.finish()
        eventually(lambda: ours.redirected() > before + 1_000_000, 10, "bytes to be redirected")
        assert theirs.redirected() == rest
        assert theirs.count("kernel", "captured", "authorized", "steered") == count

        # one loses its right, the other's connections stay
        principal = f"cluster.local/ns/{ours.namespace}/sa/{ours.client}"
        ours.mesh.apply(ours.namespace, authorization("no", "DENY", ours.server, principal))
        eventually(lambda: moving.report()["lost"] == FLOWS, 10, "the connections to be closed")
        now = resting.report()
        assert (now["open"], now["lost"], now["wrong"]) == (FLOWS, 0, 0), now
        assert theirs.sees_only_itself()
        end = resting.finish()
        assert (end["ended"], end["lost"], end["wrong"]) == (FLOWS, 0, 0), end

        # each tells of its own, to both reporters, and of nobody else's
        for side, other in ((ours, theirs), (theirs, ours)):
            eventually(
                lambda s=side: len([x for x in s.log_lines() if s.is_named_in(x)]) == 2 * FLOWS, 15, "the access log"
            )
            assert not [line for line in side.log_lines() if other.is_named_in(line)]
            told = [line for line in side.metrics().splitlines() if 'connection_security_policy="kernel"' in line]
            for which, wanted in ((side, True), (other, False)):
                words = f'source_workload="{which.client}"', f'source_workload_namespace="{which.namespace}"'
                assert any(all(word in line for word in words) for line in told) is wanted, words
    for side in (ours, theirs):
        eventually(lambda s=side: not s.rows("maps", "flows") and not s.rows("maps", "sockets"), 10, "all to be over")


def await_kernel_path(side: Side) -> None:
    """The World has to know both pods before a verdict can be written."""
    server = side.mesh.address(side.namespace, side.server)

    def taken() -> bool:
        before = side.count("kernel"), side.count("captured")
        side.mesh.exec(side.namespace, side.client, "bash", "-c", f"exec 3<>/dev/tcp/{server}/{PORT}")
        return side.count("kernel") >= before[0] + 2 and side.count("captured") == before[1]

    eventually(taken, 30, f"the kernel path on {side.node}")
