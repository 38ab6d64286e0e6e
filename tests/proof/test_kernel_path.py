"""Two pods of one node: the kernel authorizes their connections and ztunnel is off the path, in a whole lab."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ambient import ports
from ambient.errors import PlatformFault
from ambient.io.admin_client import ask, ask_json
from ambient.io.bpf_maps import Maps
from ambient.lab.driver import eventually
from ambient.manifest.acceleration import ACCELERATION
from tests.support.kernel_path import Counted, await_kernel_path, into
from tests.support.mesh import APPS, PORT, Mesh, authorization, pod, service

pytestmark = [pytest.mark.lab, pytest.mark.net]

TRUST = "cluster.local"


@pytest.fixture(scope="module")
def maps(mesh: Mesh) -> Iterator[Maps]:
    """Of node1."""
    with Maps.open(mesh.settings("node1").bpffs_dir) as found:
        yield found


def strict(name: str = "default") -> dict[str, Any]:
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "PeerAuthentication",
        "metadata": {"name": name},
        "spec": {"mtls": {"mode": "STRICT"}},
    }


def principal(namespace: str, account: str) -> str:
    return f"{TRUST}/ns/{namespace}/sa/{account}"


@contextmanager
def held_in_the_kernel(mesh: Mesh, maps: Maps, namespace: str, count: int) -> Iterator[None]:
    """``count`` flows from a to service b, open while the body runs.

    What connects while b's rights are being written anew goes through ztunnel, as it should: then once more.
    """
    b = mesh.address(namespace, "b")
    for attempt in range(4):
        with holding(mesh, namespace, mesh.vip(namespace, "b"), 80, count):
            try:
                eventually(lambda: len(into(maps, b)) == count, 5, "the flows")
            except PlatformFault:
                if attempt == 3:
                    raise
                continue
            yield
            return


@pytest.fixture
def pair(mesh: Mesh, maps: Maps) -> Iterator[str]:
    """a and b on node1, b behind a service and a headless one."""
    headless = service("headless", "b", clusterIP="None")
    with mesh.namespace(pod("a"), pod("b"), service("b"), headless) as name:
        await_kernel_path(mesh, maps, name, mesh.address(name, "b"), PORT)
        await_kernel_path(mesh, maps, name, mesh.vip(name, "b"), 80)  # endpoints follow readiness, verdicts do not
        yield name


@pytest.mark.parametrize("family", [4, 6])
def test_by_service_and_by_pod_nothing_passes_ztunnel(mesh: Mesh, maps: Maps, pair: str, family: int) -> None:
    a, b, vip = mesh.address(pair, "a", family), mesh.address(pair, "b", family), mesh.vip(pair, "b", family)
    for host, port in ((vip, 80), (b, PORT)):
        counted = Counted(maps)
        found = mesh.call(pair, "a", host, port)
        assert found.get("echoed") == "hello", found
        assert (counted["kernel"], counted["captured"], counted["hbone"], counted["steered"]) == (2, 0, 0, 0)
        assert found["peer"] == [host, port]
        for end in ("peer", "accepted"):
            assert found["seen"][end][0].removeprefix("::ffff:") == a
    b = mesh.address(pair, "b", family)
    eventually(lambda: not into(maps, b), 5, "the flows to end")


def test_by_the_names_of_a_service_and_of_a_headless_one(mesh: Mesh, maps: Maps, pair: str) -> None:
    await_kernel_path(mesh, maps, pair, "b", 80)
    await_kernel_path(mesh, maps, pair, "headless", PORT)


def test_ztunnel_has_no_connection_of_it_and_tells_of_it_all_the_same(mesh: Mesh, maps: Maps, pair: str) -> None:
    b = mesh.address(pair, "b")
    with held_in_the_kernel(mesh, maps, pair, 1):
        assert not [c for c in connections(mesh) if pair in json.dumps(c)]
        ((_, flow),) = into(maps, b)
        assert flow.server.cookie and flow.client.cookie
    eventually(lambda: not into(maps, b), 5, "the flow to end")


def test_log_and_metrics_tell_of_a_flow_as_if_ztunnel_had_carried_it(mesh: Mesh, maps: Maps, pair: str) -> None:
    text = "x" * 1000
    found = mesh.call(pair, "a", mesh.vip(pair, "b"), 80, "--text", text)
    assert found.get("echoed") == text
    client = f"{found['local'][0]}:{found['local'][1]}"

    def lines() -> list[str]:
        return [x for x in mesh.log("node1").splitlines() if f"src.addr={client}" in x and "complete" in x]

    eventually(lambda: len(lines()) >= 2, 10, "a line of either reporter")
    assert len(lines()) == 2
    for line, direction in zip(sorted(lines(), key=lambda x: "inbound" in x), ("outbound", "inbound"), strict=True):
        assert f'direction="{direction}"' in line
        assert 'connection_security_policy="kernel"' in line
        assert f"bytes_sent={len(text)}" in line or f"bytes_sent={len(text) + 1}" in line, line
        for end in ("src", "dst"):
            assert f'{end}.identity="spiffe://{TRUST}/ns/{pair}/sa/' in line
    text = ask(mesh.node_dir("node1") / "ztunnel.sock", "/metrics")
    rows = [x for x in text.splitlines() if 'connection_security_policy="kernel"' in x and f'"{pair}"' in x]
    for reporter in ("source", "destination"):
        own = [x for x in rows if f'reporter="{reporter}"' in x]
        opened, closed = (
            sum(float(x.rpartition(" ")[2]) for x in own if x.startswith(f"istio_tcp_connections_{name}_total"))
            for name in ("opened", "closed")
        )
        assert opened == closed >= 1


def connections(mesh: Mesh) -> list[Any]:
    found = ask_json(mesh.node_dir("node1") / "ztunnel.sock", "/connections")
    rows: list[Any] = found if isinstance(found, list) else found.get("connections", [])
    return rows


class holding:
    """Connections that pod a holds to a host until the block ends."""

    def __init__(self, mesh: Mesh, namespace: str, host: str, port: int, count: int) -> None:
        self._mesh = mesh
        self._where = (namespace, host, port, count)

    def __enter__(self) -> holding:
        namespace, host, port, count = self._where
        command = ["python3", str(APPS / "hold.py"), host, str(port), str(count)]
        self._mesh.kubectl("delete", "pod", "holder", "-n", namespace, "--ignore-not-found")
        self._mesh.apply(namespace, pod("holder", account="a", command=command))
        self._mesh.await_ready(namespace, {"holder"}, True)
        return self

    def __exit__(self, *exc: object) -> None:
        self._mesh.kubectl("delete", "pod", "holder", "-n", self._where[0], "--wait=true")


def test_a_pool_opened_in_a_pods_first_second_takes_the_kernel_path(mesh: Mesh, maps: Maps, pair: str) -> None:
    """Its identity is new to the node too: the verdicts were written before its first instruction ran."""
    b = mesh.address(pair, "b")
    mesh.apply(pair, authorization("some", "ALLOW", "b", principal(pair, "pool"), principal(pair, "a")))
    mesh.await_policy("node1", f"{pair}/some")
    await_kernel_path(mesh, maps, pair, mesh.vip(pair, "b"), 80)
    mesh.kubectl("create", "serviceaccount", "pool", "-n", pair)
    counted = Counted(maps)
    command = ["python3", str(APPS / "hold.py"), mesh.vip(pair, "b"), "80", "50"]
    mesh.apply(pair, pod("pool", command=command))
    eventually(lambda: len(into(maps, b)) == 50, 15, "50 flows")
    assert counted["no_verdict"] == 0
    mesh.kubectl("delete", "pod", "pool", "-n", pair, "--wait=true")
    eventually(lambda: not into(maps, b), 10, "the flows to end with their pod")


def test_a_denial_written_later_closes_the_flow_and_refuses_the_next(mesh: Mesh, maps: Maps, pair: str) -> None:
    b = mesh.address(pair, "b")
    with held_in_the_kernel(mesh, maps, pair, 3):
        began = time.monotonic()
        mesh.apply(pair, authorization("no", "DENY", "b", principal(pair, "a")))
        eventually(lambda: not into(maps, b), 10, "the flows to be closed")
        took = time.monotonic() - began
    print(f"{took:.3f} s from kubectl to the last flow")
    assert took < 5, f"{took:.1f} s from kubectl to the last flow"
    counted = Counted(maps)
    assert "error" in mesh.call(pair, "a", mesh.vip(pair, "b"), 80)
    assert counted["kernel"] == 0
    assert mesh.agent("node1")["counters"]["flows_revoked"] >= 3
    mesh.remove(pair, "authorizationpolicy", "no")
    await_kernel_path(mesh, maps, pair, mesh.vip(pair, "b"), 80)


def test_strict_is_satisfied_by_the_kernel_path(mesh: Mesh, maps: Maps, pair: str) -> None:
    mesh.apply(pair, strict())
    eventually(
        lambda: any("static_strict" in p["name"] for p in mesh.dump("node1")["policies"]), 15, "STRICT to arrive"
    )
    await_kernel_path(mesh, maps, pair, mesh.vip(pair, "b"), 80)


def test_off_means_mutual_tls_within_the_node_too(mesh: Mesh, maps: Maps, pair: str) -> None:
    mesh.kubectl("annotate", "pod", "b", "-n", pair, f"{ACCELERATION}=off")

    def captured() -> bool:
        counted = Counted(maps)
        assert mesh.call(pair, "a", mesh.vip(pair, "b"), 80).get("echoed") == "hello"
        return counted["captured"] >= 1 and counted["hbone"] + counted["ztunnel"] >= 1 and not counted["kernel"]

    eventually(captured, 10, f"a connection through :{ports.HBONE}")
    mesh.kubectl("annotate", "pod", "b", "-n", pair, f"{ACCELERATION}=fast", "--overwrite")
    eventually(lambda: any(ACCELERATION in p for p in mesh.agent("node1")["problems"]), 10, "the problem on status")
    assert captured()
    mesh.kubectl("annotate", "pod", "b", "-n", pair, f"{ACCELERATION}-")
    await_kernel_path(mesh, maps, pair, mesh.vip(pair, "b"), 80)


def test_another_nodes_endpoint_is_reached_through_ztunnel(mesh: Mesh, maps: Maps) -> None:
    with mesh.namespace(pod("a"), pod("b", "node2"), service("b")) as name:
        counted = Counted(maps)
        assert mesh.call(name, "a", mesh.vip(name, "b"), 80).get("echoed") == "hello"
        assert counted["captured"] >= 1
        assert counted["kernel"] == 0


def test_nothing_of_a_pod_is_left_in_the_kernel_when_it_is_gone(mesh: Mesh, maps: Maps) -> None:
    with mesh.namespace(pod("a"), pod("b"), service("b")) as name:
        mesh.apply(name, authorization("some", "ALLOW", "b", principal(name, "a")))
        await_kernel_path(mesh, maps, name, mesh.vip(name, "b"), 80)
        addresses = {mesh.address(name, which, family) for which in ("a", "b") for family in (4, 6)}
        number = maps.workloads[mesh.address(name, "b")].workload
        assert [k for k in maps.verdicts if k.workload == number]
        assert [v for _, v in maps.endpoints.items() if v.workload == number]

    def nothing() -> bool:
        return not (
            [a for a in maps.workloads if a in addresses]
            or [k for k in maps.verdicts if k.workload == number]
            or [v for _, v in maps.endpoints.items() if v.workload == number]
            or [k for k in maps.flows if {k.local, k.remote} & addresses]
        )

    eventually(nothing, 20, "nothing of the pods")


def test_a_killed_agent_leaves_flows_running_and_reconciles(mesh: Mesh, maps: Maps, pair: str) -> None:
    b = mesh.address(pair, "b")
    with held_in_the_kernel(mesh, maps, pair, 2):
        before = {key for key, _ in into(maps, b)}
        pid = mesh.agent("node1")["pid"]
        os.kill(pid, signal.SIGKILL)

        def back() -> bool:
            try:
                found = mesh.agent("node1")
            except Exception:
                return False
            return bool(found["pid"] != pid and found["ready"] and found["complete"])

        eventually(back, 30, "the agent to be back")
        assert {key for key, _ in into(maps, b)} == before
        await_kernel_path(mesh, maps, pair, mesh.vip(pair, "b"), 80)
