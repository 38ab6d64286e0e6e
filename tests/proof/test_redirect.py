"""Two pods of one node that ask for `redirect`: their bytes go from socket to socket, in a whole lab."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import FlowValue, TupleKey
from ambient.io.bpf_maps import Maps
from ambient.lab.driver import Background, eventually
from ambient.manifest.acceleration import ACCELERATION
from tests.support.mesh import IDLE, Mesh, pod
from tests.support.require import require

pytestmark = [pytest.mark.lab, pytest.mark.net]

SOURCE = Path(__file__).resolve().parents[1] / "net/clients/duplex.c"
FLOWS, TOTAL = 8, 2_000_000


@pytest.fixture(scope="module")
def duplex(tmp_path_factory: pytest.TempPathFactory) -> str:
    require("gcc")
    binary = tmp_path_factory.mktemp("duplex") / "duplex"
    subprocess.run(["gcc", "-Wall", "-Werror", "-O1", "-pthread", "-o", binary, SOURCE], check=True)
    return str(binary)


@pytest.fixture(scope="module")
def maps(mesh: Mesh) -> Iterator[Maps]:
    with Maps.open(mesh.settings("node1").bpffs_dir) as found:
        yield found


@pytest.fixture
def pair(mesh: Mesh, request: pytest.FixtureRequest) -> Iterator[str]:
    """a and b on node1, with the acceleration the test is parametrized with."""
    words = {"annotations": {ACCELERATION: request.param}}
    with mesh.namespace(pod("a", command=IDLE, **words), pod("b", command=IDLE, **words)) as name:
        yield name


def said(process: Background) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(process.await_output("wrong", 60))
    return found


class Exchange:
    """Connections from a to b that stay open, all bytes exchanged and checked, inside the block."""

    def __init__(self, mesh: Mesh, maps: Maps, namespace: str, binary: str, mode: str, port: int) -> None:
        self._mesh, self._maps, self._namespace, self._port = mesh, maps, namespace, port
        self._words = (str(FLOWS), mode, str(TOTAL), "65536", "500", "k", "0", "1")
        self._binary = binary

    def run(self) -> dict[TupleKey, FlowValue]:
        mesh, namespace, port = self._mesh, self._namespace, str(self._port)
        address = mesh.address(namespace, "b")
        with mesh.background(namespace, "b", self._binary, "serve", address, port, *self._words) as server:
            server.await_output("listening")
            with mesh.background(namespace, "a", self._binary, "dial", address, port, *self._words) as client:
                results = said(client), said(server)
                for found in results:
                    assert (found["wrong"], found["received"]) == (0, FLOWS * TOTAL), results
                return {key: value for key, value in self._maps.flows.items() if key.local_port == self._port}


def redirected(flows: dict[TupleKey, FlowValue]) -> int:
    return sum(flow.client.redirect_bytes + flow.server.redirect_bytes for flow in flows.values())


def report(flows: dict[TupleKey, FlowValue], record_property: Callable[[str, object], None]) -> int:
    """Tell how many bytes took which way; those that were redirected."""
    count = redirected(flows)
    for name, value in (("redirected", count), ("native", 2 * FLOWS * TOTAL - count)):
        record_property(f"{name}_bytes", value)
        print(f"{name}: {value} bytes")
    return count


def kernel_flows(exchange: Exchange) -> dict[TupleKey, FlowValue]:
    """Once the World knows both pods their connections take the kernel's path."""
    found: dict[TupleKey, FlowValue] = {}

    def all_of_them() -> bool:
        found.clear()
        found.update(exchange.run())
        return len(found) == FLOWS

    eventually(all_of_them, 40, "connections on the kernel's path")
    return found


@pytest.mark.parametrize("pair", ["redirect"], indirect=True)
def test_bytes_of_non_blocking_applications_are_redirected_and_exact(
    mesh: Mesh, maps: Maps, pair: str, duplex: str, record_property: Callable[[str, object], None]
) -> None:
    eventually(
        lambda: bool(mesh.agent("node1")["acceleration"]["kernel"]), 5, "the agent to say what the kernel can do"
    )
    flows = kernel_flows(Exchange(mesh, maps, pair, duplex, "n", 7001))
    assert {flow.acceleration for flow in flows.values()} == {LAYOUT["ACCELERATION_REDIRECT"]}
    assert report(flows, record_property) > FLOWS * TOTAL // 10
    eventually(lambda: not len(maps.flows), 10, "the flows to end")
    eventually(lambda: not maps.sockets.keys(), 10, "the sockets to leave")


@pytest.mark.parametrize("pair", ["redirect"], indirect=True)
def test_blocking_applications_stay_native_and_exact(
    mesh: Mesh, maps: Maps, pair: str, duplex: str, record_property: Callable[[str, object], None]
) -> None:
    flows = kernel_flows(Exchange(mesh, maps, pair, duplex, "b", 7002))
    assert report(flows, record_property) == 0
    assert not any(end.sighting for flow in flows.values() for end in (flow.client, flow.server))


@pytest.mark.parametrize("pair", ["direct", "auto"], indirect=True)
def test_direct_and_auto_are_native_where_splice_cannot_see_redirected_bytes(
    mesh: Mesh, maps: Maps, pair: str, duplex: str, record_property: Callable[[str, object], None]
) -> None:
    redirects = "auto_redirect" in mesh.agent("node1")["acceleration"]["kernel"]
    flows = kernel_flows(Exchange(mesh, maps, pair, duplex, "n", 7003))
    wants_direct = mesh.get("pod", "a", "-n", pair)["metadata"]["annotations"][ACCELERATION] == "direct"
    assert (report(flows, record_property) > 0) is (redirects and not wants_direct)
