"""The real agent and holder on real kernel maps and namespaces; only ztunnel is a stand-in.

Each test has pods and addresses of its own on one node. A pod's process is never touched: its number is the
same at the end of every test that changes its membership.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import msgspec
import pytest

from ambient.datapath.entries import ENROLLED, LOCAL, OPEN
from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import Admission, AuthorizedValue, TupleKey
from ambient.io import bpf_links
from ambient.manifest.kinds import NAMESPACE, POD
from ambient.manifest.mesh import REDIRECTION
from ambient.manifest.pods import MIRROR
from ambient.model.address import parse_ip
from ambient.model.policy import Action, Group, Match, Policy, Rule, Scope
from ambient.model.workload import Port, Service, TunnelProtocol, Workload
from ambient.model.world import World
from ambient.node import cni
from ambient.node.wishes import ON_FAILURE
from tests.node.real_node import NODE, RealNode, added, address, gone

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.bpf, pytest.mark.net]

ENROLLED_OPEN, DIRECT, ALLOW_ANY = LAYOUT["ENROLLED_OPEN"], LAYOUT["WORKLOAD_DIRECT"], LAYOUT["WORKLOAD_ALLOW_ANY"]
SILENT_S = LAYOUT["AGENT_SILENT_S"]


async def test_add_enrols_before_it_answers_and_passes_the_result_on(node: RealNode) -> None:
    pod = await node.pod("born", "shop")
    sandbox = node.sandbox(pod, address())
    code, result = await node.cni("ADD", pod, sandbox)
    assert code == 0 and [i["address"] for i in result["ips"]] == [f"{a}/24" for a in sandbox.addresses]
    with node.maps() as maps:
        entry = maps.workloads[sandbox.address]
        assert entry.flags == LOCAL | ENROLLED | DIRECT
        assert maps.workloads[sandbox.addresses[1]] == entry
        mine = [v for _, v in maps.enrolled.items() if v.workload == entry.workload]
        assert [(v.address4, v.address6) for v in mine] == [tuple(sandbox.addresses)]
    assert pod.metadata.uid in bpf_links.attached_pods(node.bpffs)
    assert (await node.get("born", "shop")).annotations[REDIRECTION] == "enabled"
    sandbox.start()
    ztunnel = str(node.pid("ztunnel"))
    assert sandbox.dial("10.77.200.1", 80) == ztunnel  # captured: nobody is known yet
    assert sandbox.dial("fd00:77::c8", 80) == ztunnel
    assert node.dial_from_outside(sandbox.address, 80) == ztunnel  # steered
    assert node.dial_from_outside(sandbox.addresses[1], 80) == ztunnel
    await gone(node, pod, sandbox)


async def test_add_of_an_unlabelled_pod_passes_at_once(node: RealNode) -> None:
    pod, sandbox = await added(node, "plain", "plain")
    assert (await node.reaches("plain", "not_enrolled"))["reason"] == ""
    assert pod.metadata.uid not in bpf_links.attached_pods(node.bpffs)
    assert REDIRECTION not in (await node.get("plain", "plain")).annotations
    with node.maps() as maps:
        assert maps.workloads[sandbox.address].flags == LOCAL
    await gone(node, pod, sandbox)
    assert node.traces(sandbox.addresses, pod.metadata.uid) == []


async def test_del_leaves_no_entry_and_may_be_repeated(node: RealNode) -> None:
    pod, sandbox = await added(node, "ends")
    state = await node.state("ends")
    with node.maps() as maps:
        maps.authorize_delivery(
            Admission(sandbox.address, 80, sandbox.address, 40000, workload=1, client="10.77.0.200", client_port=1)
        )
    assert len(node.traces(sandbox.addresses, pod.metadata.uid, state["netns_cookie"])) > 8
    for _ in range(2):
        code, _ = await node.cni("DEL", pod, sandbox, CNI_NETNS="")
        assert code == 0
        assert node.traces(sandbox.addresses, pod.metadata.uid, state["netns_cookie"]) == []
    # what the API still says of the pod's address is not believed
    await node.running(pod, sandbox.addresses)
    later, other = await added(node, "after")
    assert node.traces(sandbox.addresses, pod.metadata.uid) == []
    await gone(node, later, other)
    await node.client.delete(POD, "ends", "shop")


async def test_a_reused_address_has_another_owner_and_generation(node: RealNode) -> None:
    first, sandbox = await added(node, "first")
    with node.maps() as maps:
        before = maps.workloads[sandbox.address]
    # DEL is lost: the agent learns of the reuse by the next ADD only
    second = await node.pod("second", "shop")
    sandbox.remove()
    reused = node.sandbox(second, sandbox.address)
    code, result = await node.cni("ADD", second, reused)
    assert code == 0, result
    with node.maps() as maps:
        after = maps.workloads[sandbox.address]
    assert after.workload != before.workload and after.generation > before.generation
    assert first.metadata.uid not in bpf_links.attached_pods(node.bpffs)
    await gone(node, second, reused)
    await node.client.delete(POD, "first", "shop")


async def test_a_late_del_of_an_earlier_sandbox_does_not_touch_the_new_one(node: RealNode) -> None:
    pod, sandbox = await added(node, "again")
    newer = node.sandbox(pod, address())
    code, _ = await node.cni("ADD", pod, newer, container="c-second")
    assert code == 0
    code, _ = await node.cni("DEL", pod, sandbox)  # of the first container
    assert code == 0
    with node.maps() as maps:
        assert newer.address in maps.workloads and sandbox.address not in maps.workloads
    code, _ = await node.cni("DEL", pod, newer, container="c-second")
    assert node.traces(newer.addresses, pod.metadata.uid) == []
    await node.client.delete(POD, "again", "shop")


async def test_labels_enrol_and_release_a_living_pod_without_touching_it(node: RealNode) -> None:
    await node.namespace("flips")
    pod, sandbox = await added(node, "lives", "flips")
    server = sandbox.spawn(
        "import socket\nfor f, a in ((2, '0.0.0.0'),):\n"
        " s = socket.create_server((a, 8080)); print('up', flush=True)\n"
        " while True:\n  c, _ = s.accept(); c.sendall(b'app'); c.close()",
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None and server.stdout.readline() == b"up\n"
    assert node.dial_from_outside(sandbox.address, 8080) == "app"
    began = time.monotonic()
    await node.label("flips", "ambient")
    await node.reaches("lives", "enrolled")
    assert time.monotonic() - began < 3
    await node.until(lambda: _annotated(node, "lives", "flips", True), "the annotation")
    ztunnel = str(node.pid("ztunnel"))
    assert node.dial_from_outside(sandbox.address, 8080) == ztunnel
    assert sandbox.dial("10.77.200.1", 80) == ztunnel
    # its peers know already, so nobody has to be waited for
    known = Workload(uid="Kubernetes//Pod/flips/lives", name="lives", namespace="flips", node=NODE)
    node.control.discovery.set_world(World.of([known]))
    await node.label("flips", None)
    await node.reaches("lives", "not_enrolled", 40)
    assert not await _annotated(node, "lives", "flips", True)
    assert node.dial_from_outside(sandbox.address, 8080) == "app"
    assert node.traces([], pod.metadata.uid) == []
    with node.maps() as maps:
        assert maps.workloads[sandbox.address].flags & (LOCAL | ENROLLED) == LOCAL
    assert server.poll() is None and sandbox.process is not None and sandbox.process.poll() is None
    await node.label("flips", "ambient")  # the ports of the first time are free again
    await node.reaches("lives", "enrolled")
    server.kill()
    server.wait()
    server.stdout.close()
    await gone(node, pod, sandbox)


async def _annotated(node: RealNode, name: str, namespace: str, wanted: bool) -> bool:
    return ((await node.get(name, namespace)).annotations.get(REDIRECTION) == "enabled") is wanted


async def test_a_label_that_flips_back_cuts_the_draining_short(node: RealNode) -> None:
    await node.namespace("waver", "ambient")
    pod, sandbox = await added(node, "wavers", "waver")
    await node.label("waver", None)
    await node.reaches("wavers", "leaving")
    await node.label("waver", "ambient")
    began = time.monotonic()
    await node.reaches("wavers", "enrolled", 20)
    assert time.monotonic() - began < 9  # an acknowledgement that does not come, and no drain of 10 s
    assert node.dial_from_outside(sandbox.address, 80) == str(node.pid("ztunnel"))
    await gone(node, pod, sandbox)


async def test_del_does_not_wait_for_a_pod_that_is_leaving(node: RealNode) -> None:
    await node.namespace("quits", "ambient")
    pod, sandbox = await added(node, "quits", "quits")
    await node.label("quits", None)
    await node.reaches("quits", "leaving")
    began = time.monotonic()
    code, _ = await node.cni("DEL", pod, sandbox)
    assert code == 0 and time.monotonic() - began < 2
    assert node.traces(sandbox.addresses, pod.metadata.uid) == []
    await node.client.delete(POD, "quits", "quits")


async def test_a_pod_from_before_the_plugin_is_found_by_its_processes(node: RealNode) -> None:
    pod = await node.pod("old", "shop")
    sandbox = node.sandbox(pod, address())
    sandbox.start()
    await node.running(pod, sandbox.addresses)
    await node.reaches("old", "enrolled")
    assert node.dial_from_outside(sandbox.address, 80) == str(node.pid("ztunnel"))
    await gone(node, pod, sandbox)
    assert node.traces(sandbox.addresses, pod.metadata.uid) == []


HASH = "c0ffee00c0ffee00c0ffee00c0ffee00"


async def test_a_static_pod_and_the_object_that_mirrors_it_are_one(node: RealNode) -> None:
    """Kubelet and runtime know it by the hash of its manifest, which is not the UID of its object."""
    pod, sandbox = await added(node, "static", annotations={MIRROR: HASH})
    found = await node.reaches("static", "enrolled")
    assert [p["uid"] for p in (await node.status())["pods"] if p["name"] == "static"] == [HASH] == [found["uid"]]
    with node.maps() as maps:
        assert maps.workloads[sandbox.address].flags == LOCAL | ENROLLED | DIRECT
    await node.client.patch(POD, "static", {"metadata": {"labels": {"istio.io/dataplane-mode": "none"}}}, "shop")
    await node.reaches("static", "not_enrolled")
    await gone(node, pod, sandbox)
    await node.until(lambda: node.traces(sandbox.addresses, HASH) == [], "no trace of it")


async def test_an_object_that_gives_itself_the_uid_of_another_pod_is_not_that_pod(node: RealNode) -> None:
    uid = HASH[::-1]
    await node.pod("early", "shop", annotations={MIRROR: uid})
    await node.reaches("early", "waiting")
    pod, sandbox = await added(node, "sought", annotations={MIRROR: uid})
    await node.reaches("sought", "enrolled")
    await node.client.delete(POD, "early", "shop", grace_period_s=0)
    await node.pod("late", "shop", annotations={MIRROR: uid}, labels={"istio.io/dataplane-mode": "none"})

    async def noticed() -> bool:
        return "pods_with_anothers_uid" in (await node.status())["counters"]

    await node.until(noticed, "it is noticed")
    found = await node.state("sought")
    assert (found["state"], found["uid"]) == ("enrolled", uid)
    await node.client.delete(POD, "late", "shop", grace_period_s=0)
    await gone(node, pod, sandbox)


async def test_a_killed_agent_finds_everything_as_it_left_it(node: RealNode) -> None:
    pod, sandbox = await added(node, "stays")
    ending, lost = await added(node, "lost")
    await node.reaches("stays", "enrolled")
    with node.maps() as maps:
        before = (
            maps.workloads[sandbox.address],
            dict(maps.enrolled.items()),
            sorted(map(str, maps.listeners.items())),
        )
    holder = node.pid("holder")
    os.kill(node.pid("agent"), signal.SIGSTOP)  # neither DEL nor API is heard any more
    await node.client.delete(POD, "lost", "shop")
    lost.remove()
    await node.kill("agent")
    assert sandbox.dial("10.77.200.1", 80) == str(node.pid("ztunnel"))  # goes on without an agent
    await node.ready()
    await node.reaches("stays", "enrolled")
    with node.maps() as maps:
        after = (maps.workloads[sandbox.address], dict(maps.enrolled.items()), sorted(map(str, maps.listeners.items())))
    assert (after[0].workload, after[0].flags) == (before[0].workload, before[0].flags)
    assert set(after[1]) == {k for k, v in before[1].items() if v.address4 != lost.address}
    assert set(after[2]) == {k for k in before[2] if lost.address not in k and lost.addresses[1] not in k}
    assert node.traces(lost.addresses, ending.metadata.uid) == []
    assert node.dial_from_outside(sandbox.address, 80) == str(node.pid("ztunnel"))
    assert node.pid("holder") == holder
    await gone(node, pod, sandbox)


async def test_a_killed_ztunnel_and_holder_lose_no_listener(node: RealNode) -> None:
    pod, sandbox = await added(node, "kept")
    old = node.pid("ztunnel")
    os.kill(old, signal.SIGKILL)
    assert node.dial_from_outside(sandbox.address, 80) not in ("", str(old))  # it waited in the listener
    assert node.holder is not None
    node.holder.kill()
    node.holder.wait()
    agent = node.pid("agent")
    assert node.dial_from_outside(sandbox.address, 80) == str(node.pid("ztunnel"))
    node.start()
    await node.until(lambda: _holder_connected(node), "the agent found the new holder")
    assert node.pid("agent") == agent
    await node.kill("ztunnel")
    assert node.dial_from_outside(sandbox.address, 80) == str(node.pid("ztunnel"))
    later, other = await added(node, "later")
    assert node.dial_from_outside(other.address, 80) == str(node.pid("ztunnel"))
    await gone(node, later, other)
    await gone(node, pod, sandbox)


async def _holder_connected(node: RealNode) -> bool:
    status = await node.status()
    return bool(status.get("holder", {}).get("connected")) and node.pid("holder") == node.holder.pid  # type: ignore[union-attr]


async def test_of_two_agents_the_second_waits_for_the_end_of_the_first(node: RealNode) -> None:
    """They would give the same numbers to different names. A holder that was killed before it wrote down its agent's
    process, or whose agent runs a file that was replaced since, starts another one."""
    pod, sandbox = await added(node, "only")
    first = node.pid("agent")
    assert node.holder is not None
    node.holder.kill()
    node.holder.wait()
    (node.run_dir / "agent.pid").unlink()
    node.start()
    await node.until((node.run_dir / "agent.pid").exists, "another agent")
    second = node.pid("agent")
    try:
        await node.until(lambda: b"agent.lock" in _files(second), "it to be at its start")

        async def connected() -> bool:
            status = await node.status()
            return bool(status["pid"] == first and status["holder"]["connected"])

        await node.until(connected, "the first to be the new holder's")
        later, other = await added(node, "while", "shop")
        await gone(node, later, other)
        assert (await node.status())["pid"] == first and second != first
    finally:
        os.kill(first, signal.SIGKILL)

    async def taken_over() -> bool:
        status = await node.status()
        return bool(status["ready"] and status["pid"] == second)

    await node.until(taken_over, "the second to take over")
    await node.reaches("only", "enrolled")
    await gone(node, pod, sandbox)


def _files(pid: int) -> bytes:
    """What a process has open."""
    found = b""
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            found += os.readlink(entry.path).encode() + b" "
        except FileNotFoundError:
            pass
    return found


async def test_without_an_agent_add_fails_and_del_succeeds(node: RealNode) -> None:
    living, home = await added(node, "before")
    pod = await node.pod("unlucky", "shop")
    sandbox = node.sandbox(pod, address())
    away = node.run_dir / "cni.sock"
    hidden = away.rename(node.run_dir / "hidden.sock")  # what a stopped agent leaves: nobody at the path
    try:
        code, result = await node.cni("ADD", pod, sandbox)
        assert code != 0 and result["code"] == cni.TRY_AGAIN_LATER and "agent" in result["msg"]
        code, _ = await node.cni("DEL", pod, sandbox)
        assert code == 0
        assert home.dial("10.77.200.1", 80) == str(node.pid("ztunnel"))
    finally:
        hidden.rename(away)
    code, _ = await node.cni("ADD", pod, sandbox)
    assert code == 0
    await gone(node, pod, sandbox)
    await gone(node, living, home)


async def test_the_world_reaches_the_maps_and_says_nothing_of_our_addresses(node: RealNode) -> None:
    pod, sandbox = await added(node, "ours")
    remote = Workload(
        uid="Kubernetes//Pod/shop/far",
        name="far",
        namespace="shop",
        addresses=(parse_ip("10.77.9.9"),),
        node="node-b",
        protocol=TunnelProtocol.HBONE,
    )
    thief = Workload(
        uid="Kubernetes//Pod/shop/thief",
        name="thief",
        namespace="shop",
        addresses=(parse_ip(sandbox.address),),
        node="node-b",
    )
    ghost = Workload(
        uid="Kubernetes//Pod/shop/ghost", name="ghost", namespace="shop", addresses=(parse_ip("10.77.8.8"),), node=NODE
    )
    service = Service("web", "shop", "web.shop.svc.cluster.local", (parse_ip("10.96.0.9"),), (Port(80, 8080),))
    with node.maps() as maps:
        ours = maps.workloads[sandbox.address]
    node.control.discovery.set_world(World.of([remote, thief, ghost], [service]))

    async def written() -> bool:
        with node.maps() as maps:
            return "10.77.9.9" in maps.workloads and maps.settings is not None and maps.settings.complete == 1

    await node.until(written, "settings.complete")
    with node.maps() as maps:
        assert maps.workloads["10.77.9.9"].flags & ENROLLED
        assert "10.77.8.8" not in maps.workloads
        assert [k.port for k in maps.services if k.vip == "10.96.0.9"] == [80]
        assert maps.workloads[sandbox.address].workload == ours.workload
        assert maps.workloads[sandbox.address].generation >= ours.generation
        names = msgspec.json.decode((node.run_dir / "names.json").read_bytes())
        assert names["workloads"][str(maps.workloads["10.77.9.9"].workload)] == remote.uid
    await gone(node, pod, sandbox)
    with node.maps() as maps:
        # the address is free: what the World says of it holds now
        assert maps.workloads[sandbox.address].workload != ours.workload


async def test_the_heartbeat_moves_and_the_settings_name_the_cgroups(node: RealNode) -> None:
    with node.maps() as maps:
        first = maps.settings
        assert first is not None
        assert set(first.exempt_cgroups) == {os.stat(node.cgroup / n).st_ino for n in ("agent", "ztunnel")}
        assert first.kubelet_cgroups == (os.stat(node.cgroup / "kubelet").st_ino,)
        await node.until(lambda: maps.settings.heartbeat_ns > first.heartbeat_ns, "a heartbeat", 5)  # type: ignore[union-attr]


async def test_a_world_that_cannot_be_put_into_effect_leaves_the_kernels_verdicts_void(node: RealNode) -> None:
    """Numbers are written down before they are used: here that fails, as on a full disk."""

    def world(*names: str) -> World:
        return World.of(
            Workload(f"Kubernetes//Pod/shop/{n}", n, "shop", (parse_ip(f"10.77.7.{i}"),), node="node-b")
            for i, n in enumerate(names, 1)
        )

    node.control.discovery.set_world(world("one"))
    with node.maps() as maps:
        await node.until(lambda: maps.settings.complete and "10.77.7.1" in maps.workloads)  # type: ignore[union-attr]
        in_the_way = node.run_dir / f".names.json.{node.pid('agent')}"
        in_the_way.mkdir()
        try:
            node.control.discovery.set_world(world("one", "two"))
            await node.until(lambda: not maps.settings.complete, "nobody goes by the maps")  # type: ignore[union-attr]
            problems = " ".join((await node.status())["problems"])
            assert "not written to the end" in problems and in_the_way.name in problems
        finally:
            in_the_way.rmdir()
        await node.until(lambda: maps.settings.complete and "10.77.7.2" in maps.workloads)  # type: ignore[union-attr]


async def test_del_on_a_full_disk_leaves_no_entry_and_says_so(node: RealNode) -> None:
    pod, sandbox = await added(node, "unwritten")
    found = await node.reaches("unwritten", "enrolled")
    key = TupleKey(sandbox.address, "10.77.0.99", 80, 40000)
    in_the_way = node.run_dir / f".agent.json.{node.pid('agent')}"
    with node.maps() as maps:
        maps.authorized[key] = AuthorizedValue(0, time.monotonic_ns(), 0, 0, 0)
        in_the_way.mkdir()
        try:
            code, said = await node.cni("DEL", pod, sandbox)
            assert code != 0 and in_the_way.name in said["msg"]
            assert node.traces(sandbox.addresses, pod.metadata.uid, found["netns_cookie"]) == []
        finally:
            in_the_way.rmdir()
    await gone(node, pod, sandbox)
    written = msgspec.json.decode((node.run_dir / "agent.json").read_bytes())["pods"]
    assert [p for p in written if p["uid"] == pod.metadata.uid and p["in_mesh"]] == []


async def test_what_the_api_forgot_while_the_watch_was_broken_off_is_forgotten(node: RealNode) -> None:
    pod = await node.pod("fleeting", "shop")
    await node.reaches("fleeting", "waiting")
    in_the_way = node.run_dir / f".agent.json.{node.pid('agent')}"  # as on a full disk
    in_the_way.mkdir()
    try:
        await node.running(pod, [address()])

        async def broken() -> bool:
            return any(p.startswith("api: ") for p in (await node.status())["problems"])

        await node.until(broken, "the watch is broken off")
        await node.client.delete(POD, "fleeting", "shop", grace_period_s=0)
    finally:
        in_the_way.rmdir()

    async def forgotten() -> bool:
        return not any(p["name"] == "fleeting" for p in (await node.status())["pods"])

    await node.until(forgotten, "the pod is forgotten", 30)


async def test_an_agent_that_was_stopped_vouches_for_nothing_until_it_was_told_anew(node: RealNode) -> None:
    """While it was stopped ztunnel decided. Its first sign of life must not bring back what it had allowed before."""
    pod, sandbox = await added(node, "judged")
    await node.reaches("judged", "enrolled")

    def workload(*policies: str) -> Workload:
        return Workload(
            uid="Kubernetes//Pod/shop/judged",
            name="judged",
            namespace="shop",
            addresses=tuple(parse_ip(a) for a in sandbox.addresses),
            node=NODE,
            protocol=TunnelProtocol.HBONE,
            policies=policies,
        )

    deny = Policy(
        "no", "shop", Scope.WORKLOAD_SELECTOR, Action.DENY, (Group((Rule((Match(not_destination_ports=(1,)),)),)),)
    )
    node.control.discovery.set_world(World.of([workload()]))
    with node.maps() as maps:

        def open_to_all() -> bool:
            assert maps.settings is not None
            return bool(maps.settings.complete and maps.workloads[sandbox.address].flags & ALLOW_ANY)

        await node.until(open_to_all, "nobody is denied")
        assert maps.settings is not None
        agent = node.pid("agent")
        os.kill(agent, signal.SIGSTOP)
        try:
            await node.control.server.stop()  # its stream ends without its notice
            node.control.discovery.set_world(World.of([workload("shop/no")], policies=[deny]))
            silent_ns = maps.settings.heartbeat_ns + SILENT_S * 10**9
            await node.until(lambda: time.monotonic_ns() > silent_ns, "the kernel to stop believing it", SILENT_S + 5)
        finally:
            os.kill(agent, signal.SIGCONT)
        await node.until(lambda: maps.settings.heartbeat_ns > silent_ns, "a sign of life")  # type: ignore[union-attr]
        assert not open_to_all()
        await node.control.__aenter__()  # the next one, on the same port
        await node.until(lambda: maps.settings.complete, "it is believed again")  # type: ignore[union-attr]
        assert not open_to_all() and node.pid("agent") == agent
    await gone(node, pod, sandbox)


async def test_a_namespace_may_ask_to_be_open_on_failure(node: RealNode) -> None:
    await node.namespace("soft", "ambient")
    await node.client.patch(NAMESPACE, "soft", {"metadata": {"annotations": {ON_FAILURE: "open"}}})
    pod, sandbox = await added(node, "soft", "soft")
    cookie = (await node.state("soft"))["netns_cookie"]
    with node.maps() as maps:

        def opened() -> bool:
            return bool(maps.workloads[sandbox.address].flags & OPEN and maps.enrolled[cookie].flags & ENROLLED_OPEN)

        await node.until(opened, "both maps say so")
        assert maps.settings is not None and maps.settings.heartbeat_timeout_s > 2
        await node.client.patch(NAMESPACE, "soft", {"metadata": {"annotations": {ON_FAILURE: None}}})
        await node.until(
            lambda: not (maps.workloads[sandbox.address].flags & OPEN or maps.enrolled[cookie].flags & ENROLLED_OPEN),
            "closed again",
        )
    await gone(node, pod, sandbox)


async def test_garbage_on_cni_sock_gets_an_answer_and_harms_nobody(node: RealNode) -> None:
    for raw in (b"", b"{", b"\xff" * 100, b'{"env": {}, "stdin": ""}', b"[" * 100000):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(node.run_dir / "cni.sock"))
            await asyncio.to_thread(sock.sendall, raw)
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(5)
            body = msgspec.json.decode(await asyncio.to_thread(sock.recv, 65536))
            assert body["code"] != 0
    assert (await node.status())["ready"]


async def test_status_names_programs_maps_and_problems(node: RealNode) -> None:
    status = await node.status()
    assert status["ready"] and status["node"] == NODE and status["problems"] == []
    assert {p["hook"] for p in status["programs"]} >= {"connect4", "connect6", "sock_ops", "probe4"}
    assert all(p["target"] for p in status["programs"])
    assert status["maps"]["enrolled"]["limit"] == 1024
    assert Path(node.run_dir / "agent.sock").stat().st_mode & 0o777 == 0o600
