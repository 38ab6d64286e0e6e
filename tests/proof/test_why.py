"""`ambient why` says beforehand what a connection then does; where the kernel lags, it says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from ambient.datapath.values import WorkloadValue
from ambient.io.bpf_maps import Maps
from ambient.lab.driver import CommandFailed, eventually
from tests.support.mesh import PORT, STRICT, Mesh, authorization, pod, service

pytestmark = [pytest.mark.lab, pytest.mark.net]


@pytest.fixture(scope="module")
def shop(mesh: Mesh) -> Iterator[str]:
    with mesh.namespace(pod("a", "node1"), pod("b", "node2"), service("b")) as name:
        yield name


@pytest.fixture(scope="module")
def outside(mesh: Mesh) -> Iterator[str]:
    with mesh.namespace(pod("x", "node1"), enrolled=False) as name:
        yield name


def why(mesh: Mesh, source: str, destination: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The path and all steps."""
    text = mesh.ambient("why", source, destination, "--lab", mesh.lab.name, "-o", "json", check=False)
    rows: list[dict[str, Any]] = json.loads(text)
    return rows[-1], rows


def goes(mesh: Mesh, namespace: str, client: str, host: str, port: int) -> bool:
    return mesh.call(namespace, client, host, port).get("echoed") == "hello"


def test_an_allowed_connection_and_one_that_a_policy_denies(mesh: Mesh, shop: str) -> None:
    path, rows = why(mesh, f"{shop}/a", "b:80")
    assert (path["path"], path["allowed"]) == ("ztunnel", True) and goes(mesh, shop, "a", "b", 80)
    assert [r["step"] for r in rows][:4] == ["resolve", "source", "connect", "route"]
    denied = authorization("no-a", "DENY", "b", f"cluster.local/ns/{shop}/sa/a")
    mesh.apply(shop, denied)
    for node in ("node1", "node2"):
        mesh.await_policy(node, f"{shop}/no-a")
    path, rows = eventually(
        lambda: found if (found := why(mesh, f"{shop}/a", "b:80"))[0]["allowed"] is False else None, 10, "the denial"
    )
    assert path["path"] == "refused" and f"{shop}/no-a" in path["detail"]
    assert any(r["step"] == "policy" and r["result"] == f"deny {shop}/no-a matches" for r in rows)
    eventually(lambda: not goes(mesh, shop, "a", "b", 80), 5, "the connection to be refused")
    mesh.remove(shop, "authorizationpolicy", "no-a")
    mesh.await_policy("node1", f"{shop}/no-a", there=False)
    mesh.await_policy("node2", f"{shop}/no-a", there=False)
    assert why(mesh, f"{shop}/a", f"{shop}/b:{PORT}")[0]["allowed"] is True


def test_a_client_outside_the_mesh_is_refused_under_strict_only(mesh: Mesh, shop: str, outside: str) -> None:
    address = mesh.address(shop, "b")
    path, _ = why(mesh, f"{outside}/x", f"{address}:{PORT}")
    assert (path["path"], path["allowed"]) == ("ztunnel", True) and goes(mesh, outside, "x", address, PORT)
    mesh.apply(shop, STRICT)
    path, _ = eventually(
        lambda: found if (found := why(mesh, f"{outside}/x", f"{address}:{PORT}"))[0]["allowed"] is False else None,
        15,
        "STRICT to be known",
    )
    assert "STRICT" in path["detail"]
    eventually(lambda: not goes(mesh, outside, "x", address, PORT), 5, "the connection to be refused")
    assert why(mesh, f"{shop}/a", f"{address}:{PORT}")[0]["allowed"] is True
    mesh.remove(shop, "peerauthentication", "strict")


def test_a_kernel_that_holds_something_else_is_told_from_the_control_plane(mesh: Mesh, shop: str) -> None:
    address = mesh.address(shop, "b")
    with Maps.open(str(mesh.lab.bpffs / "node1")) as maps:
        right = maps.workloads[address]
        maps.workloads[address] = WorkloadValue(right.workload, 0, right.generation)
        try:
            path, rows = why(mesh, f"{shop}/a", f"{address}:{PORT}")
        finally:
            maps.workloads[address] = right
    (drift,) = [row for row in rows if row["step"] == "drift"]
    assert "the kernel holds flags=[]" in drift["why"] and "the control plane says flags=['enrolled'" in drift["why"]
    assert next(r for r in rows if r["step"] == "connect")["result"] == "not_mesh" and path["path"] == "ztunnel"
    clean, rows = why(mesh, f"{shop}/a", f"{address}:{PORT}")
    assert clean["path"] == "ztunnel" and not [row for row in rows if row["step"] == "drift"]


def test_bypass_and_the_exit_code(mesh: Mesh, shop: str) -> None:
    address = mesh.address(shop, "b")
    mesh.ambient("bypass", "on", "--namespace", shop, "--lab", mesh.lab.name)
    try:
        path, rows = why(mesh, f"{shop}/a", f"{address}:{PORT}")
        assert next(r for r in rows if r["step"] == "connect")["result"] == "bypass"
        assert (path["path"], path["allowed"]) == ("plain", True)
    finally:
        mesh.ambient("bypass", "off", "--namespace", shop, "--lab", mesh.lab.name)
    with pytest.raises(CommandFailed, match="no_port"):
        mesh.ambient("why", f"{shop}/a", "b:9999", "--lab", mesh.lab.name)
    table = mesh.ambient("why", f"{shop}/a", "b:80", "--lab", mesh.lab.name)
    assert "STEP" in table and "ztunnel" in table.splitlines()[-1]
