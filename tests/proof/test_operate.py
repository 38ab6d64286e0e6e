"""What an operator sees and does on a running mesh: maps, flows, diff and bypass, each checked from outside."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ambient.cli import cli
from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import (
    Admission,
    EndpointKey,
    EnrolledValue,
    ServiceKey,
    ServiceValue,
    VerdictKey,
    VerdictValue,
    WorkloadValue,
)
from ambient.errors import PlatformFault
from ambient.io import bpf_links
from ambient.io.bpf_maps import SPEC, Maps
from ambient.lab.driver import eventually
from tests.support.mesh import APPS, PORT, Mesh, authorization, pod, service

pytestmark = [pytest.mark.lab, pytest.mark.net]

SHOP = Path(__file__).parents[2] / "examples" / "shop"
SECRET = "plain-to-see-48151623"


def say_secret(mesh: Mesh, shop: str, host: str, port: int = 80) -> tuple[bool, bool]:
    """Call b with a text: whether it was readable between the nodes, and whether a tunnel was there."""
    with mesh.capture() as wire:
        assert mesh.call(shop, "a", host, port, "--text", SECRET).get("echoed") == SECRET
    return wire.contains(SECRET), wire.to_port(15008) > 0


def ambient(mesh: Mesh, *words: str, check: bool = True) -> list[dict[str, Any]]:
    return list(json.loads(mesh.ambient(*words, "--lab", mesh.lab.name, "-o", "json", check=check) or "[]"))


@pytest.mark.parametrize("scope", ["node", "namespace"])
def test_bypass_goes_back_to_plaintext_at_once_and_tunnels_return(mesh: Mesh, shop: str, scope: str) -> None:
    more = ["--namespace", shop] if scope == "namespace" else []
    assert say_secret(mesh, shop, "b") == (False, True)
    try:
        rows = ambient(mesh, "bypass", "on", *more)
        assert {row["node"] for row in rows} == {"node1", "node2"} and all(row["applied"] for row in rows)
        assert say_secret(mesh, shop, mesh.vip(shop, "b")) == (True, False)
        if scope == "node":
            modes = [row for row in ambient(mesh, "maps", "settings") if row["setting"] == "mode"]
            assert [row["value"] for row in modes] == ["bypass", "bypass"]
        else:
            flags = {row["workload"]: row["flags"] for row in ambient(mesh, "maps", "enrolled", "-n", shop)}
            assert all("bypass" in str(found) for found in flags.values()) and len(flags) == 3
        assert mesh.call(shop, "a", "b").get("echoed") == "hello"  # by name, too: DNS is left alone
    finally:
        ambient(mesh, "bypass", "off", *more)
    assert say_secret(mesh, shop, "b") == (False, True)
    assert all(row["mode"] == "capture" and not row["pods"] for row in ambient(mesh, "bypass", "status"))


def test_flows_show_a_held_connection_with_its_path_and_maps_can_be_filtered(mesh: Mesh, shop: str) -> None:
    command = ["python3", str(APPS / "call.py"), "--hold", mesh.vip(shop, "b"), "80"]
    with mesh.background(shop, "a", *command) as held:
        held.await_output("{")

        def seen() -> list[dict[str, object]]:
            return ambient(mesh, "flows", "--path", "ztunnel", "--pod", f"{shop}/a")

        rows = eventually(lambda: seen() if len(seen()) == 2 else [], 10, "both ztunnels to show the connection")
        assert {(r["node"], r["direction"], r["source"], r["destination"]) for r in rows} == {
            ("node1", "outbound", f"{shop}/a", f"{shop}/b"),
            ("node2", "inbound", f"{shop}/a", f"{shop}/b"),
        }
        assert ambient(mesh, "flows", "--pod", f"{shop}/c") == []
        redirects = ambient(mesh, "maps", "redirects", "--pod", f"{shop}/a")
        assert [r["original"] for r in redirects] == [f"{mesh.vip(shop, 'b')}:80"]
        assert ambient(mesh, "maps", "redirects", "--pod", f"{shop}/c") == []
    assert {r["workload"] for r in ambient(mesh, "maps", "workloads", "-n", shop)} == {f"{shop}/{x}" for x in "abc"}
    assert {r["service"] for r in ambient(mesh, "maps", "services", "--service", f"{shop}/b")} == {f"{shop}/b"}


def test_watching_counters_shows_how_fast_they_grow(mesh: Mesh, shop: str) -> None:
    words = ["maps", "counters", "--watch", "--interval", "0.5", "--lab", mesh.lab.name, "-o", "json"]
    mesh.call(shop, "a", "b")
    looks = [json.loads(line) for line in mesh.ambient(*words, "--count", "2").splitlines()]
    assert len(looks) == 2 and looks[0]["rows"][0]["per_s"] is None
    assert all(row["per_s"] >= 0 for row in looks[1]["rows"] if row["per_s"] is not None)
    overview = mesh.ambient("maps", "--watch", "--count", "1", "--lab", mesh.lab.name)
    assert "ADDED/S" in overview and "counters" in overview


def test_diff_is_clean_finds_what_was_changed_and_repairs_it(mesh: Mesh, shop: str) -> None:
    eventually(lambda: ambient(mesh, "diff", check=False) == [], 15, "the kernel to hold what it should")
    address = mesh.address(shop, "b")
    with Maps.open(str(mesh.lab.bpffs / "node1")) as maps:
        right = maps.workloads[address]
        maps.workloads[address] = WorkloadValue(right.workload, 0, right.generation)  # node1 forgets that b is enrolled
        (row,) = ambient(mesh, "diff", check=False)
        assert (row["node"], row["map"], row["key"], row["drift"]) == ("node1", "workloads", address, "differs")
        assert row["name"] == f"{shop}/b"
        (row,) = ambient(mesh, "diff", "--repair")
        assert row["repaired"] and maps.workloads[address] == right
    assert ambient(mesh, "diff") == []
    assert mesh.call(shop, "a", address, PORT).get("echoed") == "hello"


def test_a_held_connection_within_the_node_is_shown_as_direct_with_its_bytes(mesh: Mesh, shop: str) -> None:
    command = ["python3", str(APPS / "call.py"), "--hold", mesh.vip(shop, "c"), "80"]
    with mesh.background(shop, "a", *command) as held:
        held.await_output("{")
        (row,) = eventually(lambda: ambient(mesh, "flows", "--pod", f"{shop}/c"), 5, "the flow")
        assert (row["path"], row["source"], row["destination"]) == ("direct", f"{shop}/a", f"{shop}/c")
        assert row["original"] == f"{mesh.vip(shop, 'c')}:80" and str(row["identity"]).endswith(f"/ns/{shop}/sa/a")
        assert row["sent"] and row["received"] and row["redirected"] == 0
    eventually(lambda: not ambient(mesh, "flows", "--pod", f"{shop}/c"), 10, "the flow to go")


@pytest.fixture
def judged(mesh: Mesh, shop: str) -> Iterator[str]:
    """A second service in front of c, which only a may call; the verdicts are in the kernel and nothing differs."""
    mesh.apply(shop, authorization("only-a", "ALLOW", "c", f"cluster.local/ns/{shop}/sa/a"), service("d", "c"))
    mesh.await_policy("node1", f"{shop}/only-a")
    eventually(lambda: len(ambient(mesh, "maps", "endpoints", "--service", f"{shop}/d")) == 1, 10, "the second service")
    words = "maps", "verdicts", "--pod", f"{shop}/c", "--node", "node1"
    eventually(lambda: any(r["verdict"] == "allow" for r in ambient(mesh, *words)), 10, "the verdict")
    eventually(lambda: ambient(mesh, "diff", check=False) == [], 15, "the kernel to hold what it should")
    yield shop
    mesh.remove(shop, "service", "d")
    mesh.remove(shop, "authorizationpolicy", "only-a")
    mesh.await_policy("node1", f"{shop}/only-a", there=False)
    eventually(lambda: not ambient(mesh, "maps", "services", "--service", f"{shop}/d"), 10, "the second service to go")


NAMED = ("workload", "source", "destination", "service", "identity", "policy", "pod", "client_name")
"""Columns that hold a name wherever there is one."""


def test_every_map_is_shown_by_names_filtered_and_watched(mesh: Mesh, judged: str) -> None:
    def maps(*words: str) -> list[dict[str, Any]]:
        result = CliRunner().invoke(cli, ["maps", *words, "--lab", mesh.lab.name])
        assert result.exit_code == 0, result.output
        return (
            [json.loads(line) for line in result.output.splitlines()]
            if "--watch" in words
            else json.loads(result.output)
        )

    overview = {row["name"]: row["entries"] for row in maps("-o", "json") if row["node"] == "node1"}
    listed = [name for name, entries in overview.items() if entries is not None]
    assert set(overview) == set(SPEC) and len(listed) >= 13
    mesh.kubectl("annotate", "namespace", judged, "ambient.mesh/acceleration=redirect")
    mesh.kubectl("create", "serviceaccount", "shop", "-n", judged)
    mesh.apply(judged, pod("shop", command=["python3", str(SHOP / "cart.py")]))
    mesh.await_ready(judged, {"shop"}, True)
    hold, browse = ["python3", str(APPS / "call.py"), "--hold"], ["python3", str(SHOP / "browse.py")]
    vip, c = mesh.vip(judged, "b"), mesh.address(judged, "c")
    try:
        eventually(
            lambda: all("redirect" in row["flags"] for row in maps("enrolled", "-n", judged, "-o", "json")), 10, "it"
        )
        wanted = {"local", "redirect", "allow_any"}  # a connection that is made earlier goes to ztunnel, or is direct
        eventually(
            lambda: any(
                wanted <= set(row["flags"]) for row in maps("workloads", "--pod", f"{judged}/shop", "-o", "json")
            ),
            10,
            "the shop's rights",
        )
        with (
            Maps.open(str(mesh.lab.bpffs / "node1")) as held,
            mesh.background(judged, "a", *hold, vip, "80") as through_ztunnel,
            mesh.background(judged, "a", *hold, c, str(PORT)) as within,
            ExitStack() as browsing,
        ):
            shop = f"http://{mesh.address(judged, 'shop')}:{PORT}/whoami"

            def redirected() -> list[dict[str, Any]]:
                """Nothing but its messages moves a connection to redirection: one that is quiet is no proof."""
                browsing.enter_context(mesh.background(judged, "a", *browse, shop)).await_output("open")
                return maps("sockets", "-n", judged, "-o", "json")

            try:
                eventually(redirected, 10, "one to be redirected")
            except PlatformFault as fault:
                pytest.fail(f"{fault}: {maps('flows', '-n', judged, '-o', 'json')} {maps('counters', '-o', 'json')}")
            through_ztunnel.await_output("echoed")
            within.await_output("echoed")
            there = held.workloads[c]
            held.authorize_delivery(Admission(c, PORT, c, 1, workload=there.workload, generation=there.generation))
            try:
                for name in listed:
                    words = () if name in ("counters", "settings") else ("-n", judged)
                    rows = maps(name, *words, "-o", "json")
                    assert rows, f"{name} holds nothing"
                    assert not [r for r in rows for column in NAMED if isinstance(r.get(column, ""), int)], (name, rows)
                    table = CliRunner().invoke(cli, ["maps", name, *words, "--lab", mesh.lab.name]).output
                    assert len(table.splitlines()) == 1 + len(rows) and "None" not in table
                    looks = maps(name, *words, "-o", "json", "--watch", "--interval", "0.05", "--count", "2")
                    assert [set(row) - {"new", "per_s"} for row in looks[1]["rows"]] == [set(row) for row in rows]
                    if name not in ("counters", "settings"):
                        assert maps(name, "-n", "nobodys", "-o", "json") == []
                        assert looks[1]["added_per_s"] == looks[1]["removed_per_s"] == 0
                        assert not any(row["new"] for row in looks[1]["rows"])
                    else:
                        refused = CliRunner().invoke(cli, ["maps", name, "-n", judged, "--lab", mesh.lab.name])
                        assert refused.exit_code == 2 and "no names" in refused.output
            finally:
                held.withdraw_delivery(Admission(c, PORT, c, 1))
            (row,) = maps("flows", "--pod", f"{judged}/c", "-o", "json")
            assert (row["acceleration"], row["policy"], row["sent_native"]) == ("redirect", f"{judged}/only-a", None)
            assert all(row["counts"] for row in maps("verdicts", "-n", judged, "-o", "json"))
            paths = [row["value"] for row in maps("settings", "-o", "json") if row["setting"] == "exempt_cgroups"]
            assert all(str(path).endswith(("/ztunnel", "/agent")) for found in paths for path in found)
            looks = maps("-o", "json", "--watch", "--interval", "0.05", "--count", "2")
            assert {row["name"] for row in looks[1]["rows"]} == set(overview)
    finally:
        mesh.kubectl("annotate", "namespace", judged, "ambient.mesh/acceleration-")
        mesh.remove(judged, "pod", "shop")
        eventually(
            lambda: (
                len(found := maps("enrolled", "-n", judged, "-o", "json")) == 3
                and not any("redirect" in row["flags"] for row in found)
            ),
            15,
            "the kernel to hold the shop as it was",
        )


def test_what_was_taken_out_changed_or_added_in_any_map_is_named_and_repaired(mesh: Mesh, judged: str) -> None:
    a, b, c = (mesh.address(judged, name) for name in "abc")
    vips = {name: ServiceKey(mesh.vip(judged, name), 80) for name in "cd"}
    principal = f"spiffe://cluster.local/ns/{judged}/sa"
    pod_uid = mesh.get("pod", "a", "-n", judged)["metadata"]["uid"]
    with Maps.open(str(mesh.lab.bpffs / "node1")) as maps, socket.create_server(("127.0.0.1", 0)) as foreign:
        numbers = {name: maps.services[key].service for name, key in vips.items()}
        slots = {name: EndpointKey(number, 80, 0) for name, number in numbers.items()}
        of = {maps.workloads[x].workload: x for x in (a, b, c)}
        cookies = {of[value.workload]: cookie for cookie, value in maps.enrolled.items() if value.workload in of}
        identity = maps.enrolled[cookies[a]].identity
        allow = VerdictKey(identity, maps.workloads[c].workload, 0)
        deny = replace(allow, identity=maps.enrolled[cookies[c]].identity)
        right: list[tuple[Any, Any, Any]] = [
            (maps.workloads, c, maps.workloads[c]),
            (maps.workloads, b, maps.workloads[b]),
            *((maps.services, key, maps.services[key]) for key in vips.values()),
            *((maps.endpoints, key, maps.endpoints[key]) for key in slots.values()),
            *((maps.verdicts, key, maps.verdicts[key]) for key in (allow, deny)),
            *((maps.enrolled, cookie, maps.enrolled[cookie]) for cookie in cookies.values()),
        ]
        assert maps.workloads.delete(c) and maps.services.delete(vips["c"]) and maps.endpoints.delete(slots["c"])
        assert maps.verdicts.delete(allow) and maps.enrolled.delete(cookies[c])
        assert maps.listeners.delete(c, LAYOUT["LISTENER_HBONE"])
        maps.workloads[b] = replace(maps.workloads[b], flags=0)
        maps.services[vips["d"]] = replace(maps.services[vips["d"]], endpoints=3)
        maps.endpoints[slots["d"]] = replace(maps.endpoints[slots["d"]], port=81)
        maps.verdicts[deny] = replace(maps.verdicts[deny], allow=1)
        maps.enrolled[cookies[a]] = replace(maps.enrolled[cookies[a]], identity=deny.identity)
        maps.workloads["10.99.0.1"] = WorkloadValue(4711, 1, 1)
        maps.services[ServiceKey("10.99.0.2", 80)] = ServiceValue(4711, 0)
        maps.endpoints[replace(slots["d"], slot=7)] = maps.endpoints[slots["d"]]
        maps.verdicts[replace(deny, port=81)] = VerdictValue(maps.verdicts[deny].generation, 1, 0)
        maps.enrolled[4711] = EnrolledValue("10.99.0.3", "", 4711)
        maps.listeners.put("10.99.0.4", LAYOUT["LISTENER_HBONE"], foreign.fileno())
        bpf_links.detach_sk_lookup(str(mesh.lab.bpffs / "node1"), pod_uid)

        expected = {
            ("workloads", c, "missing"),
            ("workloads", b, "differs"),
            ("workloads", "10.99.0.1", "extra"),
            ("services", f"{vips['c'].vip}:80", "missing"),
            ("services", f"{vips['d'].vip}:80", "differs"),
            ("services", "10.99.0.2:80", "extra"),
            ("endpoints", f"{judged}/c:80 slot 0", "missing"),
            ("endpoints", f"{judged}/d:80 slot 0", "differs"),
            ("endpoints", f"{judged}/d:80 slot 7", "extra"),
            ("verdicts", f"{principal}/a -> {judged}/c:*", "missing"),
            ("verdicts", f"{principal}/c -> {judged}/c:*", "differs"),
            ("verdicts", f"{principal}/c -> {judged}/c:81", "extra"),
            ("enrolled", str(cookies[c]), "missing"),
            ("enrolled", str(cookies[a]), "differs"),
            ("enrolled", "4711", "extra"),
            ("listeners", f"{c} hbone", "missing"),
            ("listeners", "10.99.0.4 hbone", "extra"),
            ("sk_lookup", pod_uid, "missing"),
        }
        result = CliRunner().invoke(cli, ["diff", "--lab", mesh.lab.name, "-o", "json"])
        repaired = ambient(mesh, "diff", "--repair")
        rows = json.loads(result.output)
        assert {(r["map"], r["key"], r["drift"]) for r in rows if r["map"] != "settings"} == expected
        assert result.exit_code == 1
        by_key = {str(r["key"]): r for r in rows}
        assert by_key[f"{principal}/c -> {judged}/c:*"]["actual"]["verdict"] == "allow"
        assert by_key[str(cookies[a])]["actual"]["identity"] == f"{principal}/c"
        assert all(row["repaired"] for row in repaired)
        assert ambient(mesh, "diff") == []
        for table, key, value in right:
            own = {
                name: getattr(table[key], name) for name in ("generation", "flows", "refused") if hasattr(value, name)
            }
            assert table[key] == replace(value, **own)
    assert mesh.call(judged, "a", "b").get("echoed") == mesh.call(judged, "a", "c").get("echoed") == "hello"


def test_a_wrong_allow_is_void_once_repaired_and_closes_what_it_let_in(mesh: Mesh, judged: str) -> None:
    c = mesh.address(judged, "c")
    mesh.kubectl("create", "serviceaccount", "other", "-n", judged)
    mesh.apply(judged, pod("other", "node1"))
    mesh.await_ready(judged, {"other"}, True)
    assert "error" in mesh.call(judged, "other", c, PORT)
    with Maps.open(str(mesh.lab.bpffs / "node1")) as maps:
        number = maps.workloads[c].workload
        (identity,) = (v.identity for _, v in maps.enrolled.items() if v.address4 == mesh.address(judged, "other"))
        key = VerdictKey(identity, number, 0)
        forged = replace(maps.verdicts[key], allow=1, policy=0)
        maps.verdicts[key] = forged
        hold = ["python3", str(APPS / "call.py"), "--hold", c, str(PORT)]
        with mesh.background(judged, "other", *hold) as wrong, mesh.background(judged, "a", *hold) as good:
            wrong.await_output("echoed")
            good.await_output("echoed")
            rows = ambient(mesh, "diff", check=False)
            assert {(r["map"], r["drift"]) for r in rows} == {("verdicts", "differs"), ("flows", "extra")}
            (flow,) = (r for r in rows if r["map"] == "flows")
            assert flow["actual"]["source"] == f"{judged}/other" and flow["name"] == f"{judged}/c"
            assert all(row["repaired"] for row in ambient(mesh, "diff", "--repair"))
            assert maps.workloads[c].generation > forged.generation
            assert maps.verdicts[key] == replace(forged, allow=0, generation=maps.workloads[c].generation)
            assert {v.source for k, v in maps.flows.items() if k.local == c} == {
                maps.workloads[mesh.address(judged, "a")].workload
            }
            maps.verdicts[key] = forged  # as if it had been written a moment later: of a generation that is over
            assert "error" in mesh.call(judged, "other", c, PORT)
        assert ambient(mesh, "diff", "--repair")[0]["repaired"] and ambient(mesh, "diff") == []
    mesh.remove(judged, "pod", "other")


def test_what_the_mesh_leaves_alone_is_shown_as_plain_and_nothing_else_is(mesh: Mesh, shop: str, outside: str) -> None:
    def plain(*words: str) -> list[dict[str, object]]:
        return ambient(mesh, "flows", "--path", "plain", *words)

    hold = ["python3", str(APPS / "call.py"), "--hold"]
    x = mesh.address(outside, "x")
    with ExitStack() as stack:
        for namespace, client, host, port in (
            (shop, "a", x, PORT),  # out of the mesh
            (shop, "a", mesh.vip(shop, "b"), 80),  # by ztunnel
            (shop, "a", mesh.vip(shop, "c"), 80),  # by the kernel
            (outside, "x", mesh.address(shop, "b"), PORT),  # into the mesh: ztunnel takes it
        ):
            held = stack.enter_context(mesh.background(namespace, client, *hold, host, str(port)))
            held.await_output("echoed")
        (row,) = eventually(lambda: plain("-n", shop), 5, "the plain connection")
        about = row["node"], row["source"], row["destination"], row["direction"], row["reason"]
        assert about == ("node1", f"{shop}/a", f"{outside}/x", "outbound", "not_mesh")
        assert row["server"] == f"{x}:{PORT}" and row["sent"] == len("hello") and row["age_s"] is None
        assert isinstance(row["received"], int) and row["received"] > len("hello")
        assert plain("--pod", f"{shop}/c") == [] and plain("--pod", f"{shop}/b") == []
        paths = {r["destination"]: r["path"] for r in ambient(mesh, "flows", "--pod", f"{shop}/a", "--node", "node1")}
        assert paths == {f"{outside}/x": "plain", f"{shop}/b": "ztunnel", f"{shop}/c": "direct"}
        look = mesh.ambient("flows", "--watch", "--count", "1", "--path", "plain", "--lab", mesh.lab.name)
        assert f"{outside}/x" in look and "BYTES/S" in look
    eventually(lambda: not plain("-n", shop), 10, "the connection to go")


def test_a_bypassed_connection_is_plain_at_both_its_ends(mesh: Mesh, shop: str) -> None:
    command = ["python3", str(APPS / "call.py"), "--hold", mesh.address(shop, "b"), str(PORT)]
    ambient(mesh, "bypass", "on", "--namespace", shop)
    try:
        with mesh.background(shop, "a", *command) as held:
            held.await_output("echoed")
            rows = ambient(mesh, "flows", "--path", "plain", "-n", shop)
            seen = {(r["node"], r["direction"], r["source"], r["destination"], r["reason"], r["sent"]) for r in rows}
            assert seen == {
                ("node1", "outbound", f"{shop}/a", f"{shop}/b", "bypass", 5),
                ("node2", "inbound", f"{shop}/a", f"{shop}/b", "bypass", 5),
            }
    finally:
        ambient(mesh, "bypass", "off", "--namespace", shop)
