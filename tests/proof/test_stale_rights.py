"""No change of policy, identity, labels, endpoints or acceleration leaves a stale ALLOW usable on the kernel's path.

a on node1 connects to b on node1 without a pause while the change is made. Its connections are answered up to one
moment and never again after it. (A waypoint: net/test_rights.py.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ambient.datapath.layout import LAYOUT
from ambient.io.bpf_maps import Maps
from ambient.lab.driver import eventually
from ambient.lab.sandbox import WISHED_ADDRESS
from ambient.manifest.acceleration import ACCELERATION
from tests.support.clients import Steady, steady, steady_server
from tests.support.kernel_path import Counted, await_kernel_path
from tests.support.mesh import APPS, PORT, Mesh, authorization, pod, service

pytestmark = [pytest.mark.lab, pytest.mark.net]

STEADY_PORT = 7130
HELD = 5
CALLER = "10.244.1.220"


@pytest.fixture(scope="module")
def maps(mesh: Mesh) -> Iterator[Maps]:
    with Maps.open(mesh.settings("node1").bpffs_dir) as found:
        yield found


@pytest.fixture
def shop(mesh: Mesh, maps: Maps) -> Iterator[str]:
    """a calls; b, and later c, are behind the service s."""
    label = {"labels": {"app": "b", "serves": "yes"}}
    caller = {"annotations": {WISHED_ADDRESS: CALLER}}
    pods = [pod("a", **caller), pod("b", **label), pod("c")]
    with mesh.namespace(*pods, {**service("s"), **serving()}) as name:
        for host, port in ((mesh.address(name, "b"), PORT), (mesh.vip(name, "s"), 80), (mesh.address(name, "c"), PORT)):
            await_kernel_path(mesh, maps, name, host, port)
        yield name


def serving() -> dict[str, object]:
    made = service("s")
    return {"spec": {**made["spec"], "selector": {"serves": "yes"}}}


class Knocked:
    """Who answered, in order, once the block has ended."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, int]] = []


@contextmanager
def knocking(mesh: Mesh, namespace: str, host: str, port: int) -> Iterator[Knocked]:
    """Connections from a, one after the other, while the body runs."""
    found = Knocked()
    with mesh.background(namespace, "a", "python3", str(APPS / "knock.py"), host, str(port)) as running:
        running.await_output("knocking")
        yield found
        assert running.process.stdin is not None
        running.process.stdin.close()
        found.runs = [(who, count) for who, count in json.loads(running.await_output("[[", 10))]


@contextmanager
def held(mesh: Mesh, namespace: str) -> Iterator[Steady]:
    """Connections from a to b that were open before the change."""
    target = f"{mesh.address(namespace, 'b')}:{STEADY_PORT}"
    with (
        steady_server(mesh, namespace, "b", STEADY_PORT),
        steady(mesh, namespace, "a", "e", target, count=HELD) as client,
    ):
        yield client


def principal(namespace: str, account: str) -> str:
    return f"cluster.local/ns/{namespace}/sa/{account}"


def deny(mesh: Mesh, namespace: str) -> None:
    mesh.apply(namespace, authorization("no", "DENY", "b", principal(namespace, "a")))


def allow_another(mesh: Mesh, namespace: str) -> None:
    mesh.apply(namespace, authorization("others", "ALLOW", "b", principal(namespace, "c")))


def label_as_closed(mesh: Mesh, namespace: str) -> None:
    mesh.kubectl("label", "pod", "b", "-n", namespace, "app=closed", "--overwrite")


@pytest.mark.parametrize("change", [deny, allow_another, label_as_closed])
def test_a_lost_right_refuses_from_one_moment_on_and_closes_what_is_open(
    mesh: Mesh, maps: Maps, shop: str, change: object
) -> None:
    mesh.apply(shop, authorization("closed", "DENY", "closed", principal(shop, "a")))
    mesh.await_policy("node1", f"{shop}/closed")
    b = mesh.address(shop, "b")
    await_kernel_path(mesh, maps, shop, b, PORT)
    counted = Counted(maps)
    with held(mesh, shop) as client, knocking(mesh, shop, b, PORT) as found:
        assert callable(change)
        eventually(lambda: counted["kernel"] > 40, 10, "connections on the kernel's path")
        change(mesh, shop)
        eventually(lambda: client.report()["lost"] == HELD, 10, "open connections to be closed")
        refusing = Counted(maps)
        eventually(lambda: refusing["captured"] > 40, 20, "connections to be refused")
        assert refusing["kernel"] == 0
    print(found.runs)
    assert [who for who, _ in found.runs] == [b, "refused"]


def test_an_address_with_another_identity_has_none_of_its_rights(mesh: Mesh, maps: Maps, shop: str) -> None:
    """From its first moment on: the second pod at the address knocks as soon as it runs."""
    mesh.apply(shop, authorization("only", "ALLOW", "b", principal(shop, "a")))
    mesh.await_policy("node1", f"{shop}/only")
    b = mesh.address(shop, "b")
    await_kernel_path(mesh, maps, shop, b, PORT)
    with held(mesh, shop) as client:
        eventually(lambda: client.report()["moving"] == HELD, 5, "open connections")
        mesh.kubectl("delete", "pod", "a", "-n", shop, "--wait=true")
        eventually(lambda: not [k for k, _ in maps.flows.items() if k.remote == CALLER], 10, "a's flows to end")
    counted = Counted(maps)
    mesh.kubectl("create", "serviceaccount", "d", "-n", shop)
    knock = f"sleep 100 | python3 {APPS / 'knock.py'} {b} {PORT}"
    mesh.apply(shop, pod("a", account="d", command=["sh", "-c", knock], annotations={WISHED_ADDRESS: CALLER}))
    eventually(lambda: counted["captured"] > 20, 40, "it to knock")
    assert mesh.address(shop, "a") == CALLER
    assert "error" in mesh.call(shop, "a", b, PORT)
    assert counted["kernel"] == 0


def test_who_is_no_endpoint_any_more_gets_no_new_connection_and_keeps_what_is_open(
    mesh: Mesh, maps: Maps, shop: str
) -> None:
    b, c = mesh.address(shop, "b"), mesh.address(shop, "c")
    with held(mesh, shop) as client, knocking(mesh, shop, mesh.vip(shop, "s"), 80) as found:
        mesh.kubectl("label", "pod", "c", "-n", shop, "serves=yes")
        mesh.kubectl("label", "pod", "b", "-n", shop, "serves-")

        def alone() -> bool:
            (service_port,) = [v for k, v in maps.services.items() if k.vip == mesh.vip(shop, "s")]
            slots = [v for k, v in maps.endpoints.items() if k.service == service_port.service]
            return [slot.address4 for slot in slots] == [c]

        eventually(alone, 10, "c to be the only endpoint")
        counted = Counted(maps)
        eventually(lambda: counted["kernel"] > 40, 10, "connections to c")
        now = client.report()
        assert (now["open"], now["moving"], now["lost"]) == (HELD, HELD, 0), "a right is not lost"
    print(found.runs)
    who = [name for name, _ in found.runs]
    assert who[0] == b and who[-1] == c and "refused" not in who
    assert found.runs[-1][1] >= 20, "none to b once it was no endpoint"


def test_off_ends_the_kernels_path_from_one_moment_on_without_an_error(mesh: Mesh, maps: Maps, shop: str) -> None:
    b = mesh.address(shop, "b")
    with held(mesh, shop) as client, knocking(mesh, shop, b, PORT) as found:
        mesh.kubectl("annotate", "pod", "b", "-n", shop, f"{ACCELERATION}=off")
        eventually(lambda: maps.workloads[b].flags & LAYOUT["WORKLOAD_OFF"], 10, "the kernel to know")
        counted = Counted(maps)
        eventually(lambda: counted["captured"] > 20, 20, "connections through ztunnel")
        # one may have been decided before, and admitted after
        assert counted["kernel"] <= 1
        now = client.report()
        assert (now["open"], now["moving"], now["lost"]) == (HELD, HELD, 0), "a right is not lost"
    assert [who for who, _ in found.runs] == [b]
