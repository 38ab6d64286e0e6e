"""`ambient why` says beforehand what a connection then does; where the kernel lags, it says so."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import WorkloadValue
from ambient.io.bpf_maps import Maps
from ambient.lab.driver import CommandFailed, eventually
from tests.support.mesh import PORT, STRICT, Mesh, authorization

pytestmark = [pytest.mark.lab, pytest.mark.net]


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


def test_a_client_outside_the_mesh_is_followed_behind_a_service(mesh: Mesh, shop: str, outside: str) -> None:
    def foretold(allowed: bool) -> bool:
        return why(mesh, f"{outside}/x", f"{shop}/b:80")[0]["allowed"] is allowed

    vip = mesh.vip(shop, "b")
    assert foretold(True) and goes(mesh, outside, "x", vip, 80)
    mesh.apply(shop, authorization("only-a", "ALLOW", "b", f"cluster.local/ns/{shop}/sa/a"))
    try:
        eventually(lambda: foretold(False), 15, "the policy to be known")
        path, rows = why(mesh, f"{outside}/x", f"{vip}:80")
        assert path["path"] == "refused" and "ALLOW policies" in path["detail"]
        assert f"{mesh.address(shop, 'b')}:{PORT}" in next(r for r in rows if r["step"] == "authorize")["result"]
        eventually(lambda: not goes(mesh, outside, "x", vip, 80), 5, "the connection to be refused")
    finally:
        mesh.remove(shop, "authorizationpolicy", "only-a")
    eventually(lambda: foretold(True), 15, "the policy to be gone")


def test_a_port_on_which_nobody_listens_is_told(mesh: Mesh, shop: str) -> None:
    for name in ("b", "c"):
        address = mesh.address(shop, name)
        _, rows = why(mesh, f"{shop}/a", f"{address}:{PORT + 1}")
        (row,) = [r for r in rows if r["step"] == "listen"]
        assert row["result"] == f"{address}:{PORT + 1}: nobody listens"
        assert not goes(mesh, shop, "a", address, PORT + 1)
        assert not [r for r in why(mesh, f"{shop}/a", f"{address}:{PORT}")[1] if r["step"] == "listen"]


def test_without_ztunnel_what_the_kernel_lets_pass_is_foretold_and_the_rest_is_unknown(mesh: Mesh, shop: str) -> None:
    root = int((mesh.node_dir("node1") / "ztunnel.pid").read_text())
    children = Path(f"/proc/{root}/task/{root}/children").read_text().split()
    stopped = [root, *map(int, children)]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        assert why(mesh, f"{shop}/a", f"{mesh.address(shop, 'c')}:{PORT}")[0]["path"] == "direct"
        assert why(mesh, f"{shop}/a", f"{mesh.address(shop, 'b')}:{PORT}")[0]["allowed"] is None
        with pytest.raises(CommandFailed, match="exit code 2"):
            mesh.ambient("why", f"{shop}/a", "b:80", "--lab", mesh.lab.name)
        with pytest.raises(CommandFailed, match="exit code 1"):
            mesh.ambient("status", "--lab", mesh.lab.name)
    finally:
        for pid in reversed(stopped):
            os.kill(pid, signal.SIGCONT)
    eventually(lambda: mesh.ambient("status", "--lab", mesh.lab.name), 10, "all parts to work again")


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


def taken(mesh: Mesh, shop: str, host: str, port: int) -> str:
    """Make one connection from a: which of the two paths the kernel counted it on."""
    with Maps.open(str(mesh.lab.bpffs / "node1")) as maps:
        before = maps.counters()
        assert goes(mesh, shop, "a", host, port)
        after = maps.counters()
    grown = [name for name in ("kernel", "captured") if after.get(name, 0) > before.get(name, 0)]
    return {"kernel": "direct", "captured": "ztunnel"}["+".join(grown)]


def test_the_path_within_a_node_is_foretold_and_taken(mesh: Mesh, shop: str) -> None:
    vip, address = mesh.vip(shop, "c"), mesh.address(shop, "c")

    def foretold(path: str, host: str = "c:80") -> bool:
        return bool(why(mesh, f"{shop}/a", host)[0]["path"] == path)

    for host, port in ((vip, 80), (address, PORT)):
        eventually(lambda to=f"{host}:{port}": foretold("direct", to), 10, "the kernel path")  # type: ignore[misc]
        assert taken(mesh, shop, host, port) == "direct"
    mesh.kubectl("annotate", "namespace", shop, "ambient.mesh/acceleration=off")
    eventually(lambda: foretold("ztunnel"), 10, "the annotation to be heeded")
    _, rows = why(mesh, f"{shop}/a", "c:80")
    assert any(r["step"] == "same node" and "acceleration_off" in r["result"] for r in rows)
    assert taken(mesh, shop, vip, 80) == "ztunnel"
    able = "can_redirect" in mesh.agent("node1")["acceleration"]["kernel"]
    mesh.kubectl("annotate", "namespace", shop, "ambient.mesh/acceleration=redirect", "--overwrite")
    eventually(lambda: foretold("redirect" if able else "direct"), 10, "the annotation to be heeded")
    mesh.kubectl("annotate", "namespace", shop, "ambient.mesh/acceleration-")
    eventually(lambda: foretold("direct"), 10, "the kernel path again")
    mesh.apply(shop, authorization("no-a", "DENY", "c", f"cluster.local/ns/{shop}/sa/a"))
    eventually(lambda: foretold("refused"), 15, "the denial")
    path, rows = why(mesh, f"{shop}/a", "c:80")
    assert any(r["step"] == "same node" and "verdict_denies" in r["result"] and "no-a" in r["why"] for r in rows)
    assert f"{shop}/no-a" in path["detail"] and not goes(mesh, shop, "a", vip, 80)
    mesh.remove(shop, "authorizationpolicy", "no-a")
    eventually(lambda: foretold("direct"), 15, "the kernel path after the denial is gone")


def within(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The connect hook's decision within the node; the only one there is."""
    (row,) = [r for r in rows if r["step"] == "same node"]
    return row


def test_each_reason_of_the_kernel_is_foretold_explained_and_taken(mesh: Mesh, shop: str) -> None:
    c = mesh.address(shop, "c")

    def says(path: str, *words: str, drift: str = "") -> None:
        """One question and one connection."""
        outcome, rows = why(mesh, f"{shop}/a", f"{c}:{PORT}")
        row = within(rows)
        said = f"{row['result']}; {row['why']}"
        assert outcome["path"] == path and all(word in said for word in words), (outcome, said)
        drifted = [r for r in rows if r["step"] == "drift"]
        assert len(drifted) == bool(drift) and all(drift in f"{r['result']}; {r['why']}" for r in drifted), drifted
        assert taken(mesh, shop, c, PORT) == path

    def is_so(result: str) -> bool:
        return result in within(why(mesh, f"{shop}/a", f"{c}:{PORT}")[1])["result"]

    eventually(lambda: is_so("kernel, direct"), 15, "the kernel path")
    says("direct", "no policy selects the destination")
    mesh.apply(shop, authorization("only-a", "ALLOW", "c", f"cluster.local/ns/{shop}/sa/a"))
    mesh.await_policy("node1", f"{shop}/only-a")
    policy = f"policy {shop}/only-a"
    eventually(lambda: policy in within(why(mesh, f"{shop}/a", f"{c}:{PORT}")[1])["why"], 15, "the verdict")
    says("direct", "its verdict allows the connection", policy)
    with Maps.open(str(mesh.lab.bpffs / "node1")) as maps:
        workload = maps.workloads[c]
        ((key, right),) = ((k, v) for k, v in maps.verdicts.items() if k.workload == workload.workload and v.allow)
        name = f"verdicts spiffe://cluster.local/ns/{shop}/sa/a -> {shop}/c:*"
        try:
            maps.verdicts[key] = replace(right, generation=right.generation - 1)
            holds = f"the kernel holds generation={right.generation - 1} while the control plane says generation="
            says("ztunnel", "stale_verdict", "an earlier generation", drift=f"{name}: differs; {holds}")
            maps.verdicts[key] = replace(right, allow=0)
            holds = "the kernel holds verdict=deny while the control plane says verdict=allow"
            says("ztunnel", "verdict_denies", drift=f"{name}: differs; {holds}")
            maps.verdicts.delete(key)
            says("ztunnel", "no_verdict", drift=f"{name}: missing; the kernel holds nothing")
        finally:
            maps.verdicts[key] = right
        maps.workloads[c] = replace(workload, flags=workload.flags | LAYOUT["WORKLOAD_WAYPOINT"])
        try:
            says("ztunnel", "captured", "the destination has a waypoint", drift=f"workloads {c}: differs")
        finally:
            maps.workloads[c] = workload
        agent = mesh.agent("node1")["pid"]
        os.kill(agent, signal.SIGSTOP)
        try:
            assert maps.settings is not None
            maps.settings = replace(maps.settings, heartbeat_ns=time.monotonic_ns() - 20 * 10**9)
            says("ztunnel", "the agent was last heard of 2", "verdicts do not count")
        finally:
            os.kill(agent, signal.SIGCONT)
    eventually(lambda: is_so("kernel, direct"), 10, "the kernel path while the agent is heard of again")
    somewhere = authorization("only-a", "ALLOW", "c", f"cluster.local/ns/{shop}/sa/a")
    somewhere["spec"]["rules"][0]["from"][0]["source"]["ipBlocks"] = [f"{mesh.address(shop, 'a')}/32"]
    mesh.apply(shop, somewhere)
    eventually(lambda: is_so("no_verdict"), 15, "the clause on addresses")
    says("ztunnel", "no_verdict", "no verdict is written for this identity: ztunnel decides")
    mesh.remove(shop, "authorizationpolicy", "only-a")
    eventually(lambda: is_so("kernel, direct"), 15, "the kernel path again")
