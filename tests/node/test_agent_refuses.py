"""Pods that the real agent does not take into the mesh: which, and where the reason stands."""

from __future__ import annotations

import json
import socket
import subprocess

import pytest

from ambient.datapath.values import EnrolledValue, ListenerKey
from ambient.io.bpf_sys import BpfFault
from ambient.manifest.kinds import POD
from ambient.node.annotations import NOT_ENROLLED
from tests.node.real_node import RealNode, added, address, gone

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.bpf, pytest.mark.net]


@pytest.mark.parametrize("name", ["enrolled", "listeners"])
async def test_a_pod_for_which_a_map_has_no_room_is_refused_with_the_reason(node: RealNode, name: str) -> None:
    before, neighbour = await added(node, f"before-{name}")
    pod = await node.pod(f"late-{name}", "shop")
    sandbox = node.sandbox(pod, address())
    with node.maps() as maps, socket.create_server(("127.0.0.1", 0)) as listener:
        table = maps.tables[name]
        key, value = (
            (lambda n: (n << 40).to_bytes(8, "little"), EnrolledValue("10.77.9.9", "", 4_000_000).encode())
            if name == "enrolled"
            else (lambda n: ListenerKey(f"fd00:99::{n:x}", 1).encode(), listener.fileno().to_bytes(8, "little"))
        )
        with pytest.raises(BpfFault, match=rf"map {name}"):
            for number in range(1, table.info.max_entries + 1):
                table.update(key(number), value)
        code, result = await node.cni("ADD", pod, sandbox)
        assert code != 0 and f"map {name}" in json.dumps(result), result
        assert node.traces(sandbox.addresses, pod.metadata.uid) == []
        assert neighbour.dial("10.77.200.1", 80) == str(node.pid("ztunnel")), "others are captured as before"
        table.delete_many(
            [raw for n in range(1, table.info.max_entries + 1) if table.lookup(raw := key(n)) is not None]
        )
    code, result = await node.cni("ADD", pod, sandbox)
    assert code == 0, result
    await gone(node, pod, sandbox)
    await gone(node, before, neighbour)


async def test_an_application_on_a_mesh_port_is_refused_with_a_reason(node: RealNode) -> None:
    await node.namespace("clash")
    pod, sandbox = await added(node, "clashes", "clash")
    squatter = sandbox.spawn(
        "import socket, signal\ns = socket.create_server(('0.0.0.0', 15008)); print('up', flush=True); signal.pause()",
        stdout=subprocess.PIPE,
    )
    assert squatter.stdout is not None and squatter.stdout.readline() == b"up\n"
    await node.label("clash", "ambient")
    state = await node.reaches("clashes", "refused")
    assert state["reason"] == "mesh_port_in_use" and "15008" in state["detail"]
    await node.until(lambda: _told(node, "clashes", "clash", "mesh_port_in_use"), "the reason on the pod")
    assert node.traces([], pod.metadata.uid) == []
    squatter.kill()
    squatter.wait()
    squatter.stdout.close()
    await node.reaches("clashes", "enrolled", 20)  # tried again by itself
    await node.until(lambda: _told(node, "clashes", "clash", ""), "the reason is gone from the pod")
    await gone(node, pod, sandbox)


async def _told(node: RealNode, name: str, namespace: str, reason: str) -> bool:
    said = (await node.get(name, namespace)).annotations.get(NOT_ENROLLED, "")
    return said.startswith(reason) if reason else not said


@pytest.mark.parametrize(
    ("name", "more", "reason"),
    [
        ("sandboxed", {"spec": {"runtimeClassName": "gvisor"}}, "sandbox"),
        ("machine", {"labels": {"kubevirt.io": "virt-launcher"}}, "kubevirt"),
        ("sidecar", {"annotations": {"sidecar.istio.io/status": "{}"}}, "sidecar"),
    ],
)
async def test_pods_the_mesh_cannot_serve_start_and_say_why(
    node: RealNode, name: str, more: dict[str, object], reason: str
) -> None:
    pod, sandbox = await added(node, name, **more)
    state = await node.reaches(name, "refused")
    assert state["reason"] == reason and state["detail"]
    await node.until(lambda: _told(node, name, "shop", reason), "the reason on the pod")
    assert node.traces([], pod.metadata.uid) == []
    await gone(node, pod, sandbox)


async def test_host_network_pods_are_refused_and_never_keys(node: RealNode) -> None:
    pod = await node.pod("hosted", "shop", spec={"hostNetwork": True})
    await node.running(pod, ["10.77.0.1"])
    assert (await node.reaches("hosted", "refused"))["reason"] == "host_network"
    with node.maps() as maps:
        assert "10.77.0.1" not in maps.workloads
    await node.client.delete(POD, "hosted", "shop")


async def test_a_pod_that_forwards_packets_is_not_enrolled(node: RealNode) -> None:
    await node.namespace("router")
    pod, sandbox = await added(node, "routes", "router")
    sandbox.ask("open('/proc/sys/net/ipv6/conf/all/forwarding', 'w').write('1')")
    await node.label("router", "ambient")
    assert (await node.reaches("routes", "refused"))["reason"] == "forwards"
    sandbox.ask("open('/proc/sys/net/ipv6/conf/all/forwarding', 'w').write('0')")
    await node.reaches("routes", "enrolled", 20)
    await gone(node, pod, sandbox)


async def test_a_pod_with_nested_namespaces_is_not_enrolled(node: RealNode) -> None:
    await node.namespace("nested")
    pod, sandbox = await added(node, "nests", "nested")
    inner = sandbox.spawn(
        "import ctypes, signal\nctypes.CDLL(None).unshare(0x40000000); print('up', flush=True); signal.pause()",
        stdout=subprocess.PIPE,
    )
    assert inner.stdout is not None and inner.stdout.readline() == b"up\n"
    await node.label("nested", "ambient")
    assert (await node.reaches("nests", "refused"))["reason"] == "nested_namespaces"
    inner.kill()
    inner.wait()
    inner.stdout.close()
    await node.reaches("nests", "enrolled", 20)
    await gone(node, pod, sandbox)
