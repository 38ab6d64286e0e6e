"""What the command line asks of a real agent: bypass, and what the kernel holds against what it should."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from ambient.datapath.entries import BYPASS
from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import EnrolledValue, ServiceKey, ServiceValue, WorkloadValue
from ambient.io import bpf_links
from tests.node.real_node import RealNode, added, gone

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.bpf, pytest.mark.net]


async def ask(node: RealNode, method: str, path: str) -> tuple[int, Any]:
    connector = aiohttp.UnixConnector(str(node.run_dir / "agent.sock"))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.request(method, f"http://agent{path}") as response,
    ):
        text = await response.text()
        return response.status, json.loads(text) if response.status == 200 else text


async def test_bypass_of_a_namespace_touches_its_pods_only_and_outlives_the_agent(node: RealNode) -> None:
    pod, sandbox = await added(node, "one", "shop")
    another, elsewhere = await added(node, "two", "other")
    ztunnel = str(node.pid("ztunnel"))
    assert sandbox.dial("10.77.200.1", 80) == ztunnel
    code, answer = await ask(node, "POST", "/bypass?on=1&namespace=shop")
    assert code == 200
    assert answer == {"node": False, "namespaces": ["shop"], "pods": ["shop/one"], "applied": True}
    # nobody is at that address: no ztunnel answers any more, neither out of the pod nor into it
    assert sandbox.dial("10.77.0.1", 9) == "ConnectionRefusedError"
    assert node.dial_from_outside(sandbox.address, 80) == "ConnectionRefusedError"
    assert elsewhere.dial("10.77.200.1", 80) == ztunnel

    await node.kill("agent")
    await node.ready()
    await node.reaches("one", "enrolled")
    assert (await ask(node, "GET", "/bypass"))[1]["pods"] == ["shop/one"]
    with node.maps() as maps:
        assert maps.workloads[sandbox.address].flags & BYPASS
        assert not maps.workloads[elsewhere.address].flags & BYPASS
    late, later = await added(node, "late", "shop")
    with node.maps() as maps:
        assert maps.workloads[later.address].flags & BYPASS

    code, answer = await ask(node, "POST", "/bypass?on=0&namespace=shop")
    assert (code, answer["namespaces"], answer["pods"]) == (200, [], [])
    assert sandbox.dial("10.77.200.1", 80) == later.dial("10.77.200.1", 80) == ztunnel
    assert node.dial_from_outside(sandbox.address, 80) == ztunnel
    for each in ((pod, sandbox), (another, elsewhere), (late, later)):
        await gone(node, *each)


async def test_bypass_of_the_node_is_in_settings_and_on_status(node: RealNode) -> None:
    pod, sandbox = await added(node, "three", "shop")
    assert (await ask(node, "POST", "/bypass?on=1"))[0] == 200
    assert sandbox.dial("10.77.0.1", 9) == "ConnectionRefusedError"
    await node.kill("agent")
    await node.ready()
    with node.maps() as maps:
        assert maps.settings is not None and maps.settings.mode == LAYOUT["MODE_BYPASS"]
    assert (await node.status())["bypass"] == {"node": True, "namespaces": []}
    assert (await ask(node, "POST", "/bypass?on=0"))[1]["applied"]
    assert sandbox.dial("10.77.200.1", 80) == str(node.pid("ztunnel"))
    await gone(node, pod, sandbox)


@pytest.mark.parametrize("query", ["", "?on=2", "?on=yes", "?on=1&namespace=nowhere"])
async def test_bypass_asked_wrongly_changes_nothing(node: RealNode, query: str) -> None:
    code, said = await ask(node, "POST", f"/bypass{query}")
    assert code == 400 and said.strip()
    assert (await ask(node, "GET", "/bypass"))[1]["namespaces"] == []


async def test_drift_is_found_named_and_repaired(node: RealNode) -> None:
    pod, sandbox = await added(node, "kept", "shop")
    cookie = (await node.state("kept"))["netns_cookie"]

    async def clean() -> bool:
        return (await ask(node, "GET", "/diff"))[1]["drift"] == []

    await node.until(clean, "nothing differs")
    with node.maps() as maps:
        right = maps.workloads[sandbox.address]
        maps.workloads[sandbox.address] = WorkloadValue(right.workload, 0, right.generation)
        maps.workloads["10.99.0.1"] = WorkloadValue(4711, 1, 1)
        maps.services[ServiceKey("10.99.0.2", 80)] = ServiceValue(4711, 0)
        held = maps.enrolled[cookie]
        maps.enrolled[cookie] = replace(held, flags=LAYOUT["ENROLLED_BYPASS"], flows=3, refused=2)
        maps.enrolled[4711] = EnrolledValue("10.99.0.3", "", 4711)
        assert maps.listeners.delete(sandbox.address, LAYOUT["LISTENER_HBONE"])
        assert maps.settings is not None
        maps.settings = replace(maps.settings, cluster_ranges=())
    bpf_links.detach_sk_lookup(str(node.bpffs), pod.metadata.uid)

    _, found = await ask(node, "GET", "/diff")
    drift = {(row["map"], row["key"]): row["drift"] for row in found["drift"]}
    expected = {
        ("workloads", sandbox.address): "differs",
        ("workloads", "10.99.0.1"): "extra",
        ("services", "10.99.0.2:80"): "extra",
        ("enrolled", str(cookie)): "differs",
        ("enrolled", "4711"): "extra",
        ("listeners", f"{sandbox.address} hbone"): "missing",
        ("sk_lookup", pod.metadata.uid): "missing",
    }
    assert {key: word for key, word in drift.items() if key[0] != "settings"} == expected  # a heartbeat rewrites those
    row = next(r for r in found["drift"] if r["key"] == sandbox.address)
    assert row["name"] == "shop/kept" and "enrolled" in row["wanted"]["flags"] and row["actual"]["flags"] == []

    _, repaired = await ask(node, "POST", "/repair")
    assert {(r["map"], r["key"]) for r in repaired["drift"]} >= set(expected) and repaired["left"] == []
    assert await clean()
    with node.maps() as maps:
        mended = maps.workloads[sandbox.address]
        assert mended == replace(right, generation=mended.generation)
        assert mended.generation > right.generation  # nobody knows whom the wrong entry let in
        assert (maps.enrolled[cookie].flows, maps.enrolled[cookie].refused) == (3, 2)  # programs' own, kept
        maps.enrolled[cookie] = held
    assert node.dial_from_outside(sandbox.address, 80) == str(node.pid("ztunnel"))
    await gone(node, pod, sandbox)
