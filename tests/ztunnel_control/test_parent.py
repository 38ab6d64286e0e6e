"""ztunnel's parent and control process, for real, between a holder and workers that the test plays."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ambient.control.certificates import PodFacts
from ambient.model.policy import Action
from ambient.model.world import World
from ambient.node import messages as node
from tests.support.control import ControlPlane, Now, until
from tests.support.relay_worker import Given
from tests.support.shop import from_account, pod, policy, serves, service, spiffe, workload
from tests.support.ztunnel import Holder, Listeners, TestWorker, Ztunnel
from ztunnel.core.dns import TYPE_A, Question, answers_of, build_query
from ztunnel.core.messages import (
    AskCertificate,
    AskRoute,
    AskVerdict,
    Certificate,
    ConnectionEvent,
    Events,
    Route,
    Verdict,
)

WEB, CART = pod("web-1", "10.0.0.1"), pod("cart-1", "10.0.0.2")
VIP = "10.96.0.10"
WORLD = World.of(
    [workload("web-1", "10.0.0.1"), workload("cart-1", "10.0.0.2", services=serves("cart"))], [service("cart", VIP)]
)
ROUTE = AskRoute(source="uid-web-1", ip=VIP, port=80)
VERDICT = AskVerdict(
    destination="uid-cart-1", destination_ip="10.0.0.2", port=8080, identity=spiffe("web"), source_ip="10.0.0.1"
)


@dataclass
class Node:
    """Everything around ztunnel."""

    ztunnel: Ztunnel
    holder: Holder
    control: ControlPlane
    listeners: dict[str, Listeners]

    async def begin(self) -> TestWorker:
        """The holder's snapshot: two pods. Returns the first worker."""
        await self.holder.accept()
        for each in (WEB, CART):
            assert await self.holder.put(each, self.listeners[each.uid]) == node.Ack(uid=each.uid)
        await self.holder.send(node.SnapshotSent())
        worker = await TestWorker(Path(self.ztunnel.settings.run_dir)).connect()
        await worker.receive(Given, snapshot=True)
        return worker


@pytest.fixture
async def around(tmp_path: Path) -> AsyncIterator[Node]:
    async with ControlPlane(tmp_path, Now(time.time())) as control:
        run_dir = tmp_path / "run"
        run_dir.mkdir()
        settings = control.node(
            run_dir=str(run_dir), ztunnel_workers=1, admin_port=0, metrics_port=0, readiness_port=0, drain_s=1.0
        )
        control.pods["n1"] += [PodFacts(f"uid-{name}-1", f"{name}-1", "shop", name) for name in ("web", "cart")]
        control.discovery.set_world(WORLD)
        holder = Holder(run_dir)
        listeners = {uid: Listeners() for uid in (WEB.uid, CART.uid)}
        async with Ztunnel(tmp_path, settings) as ztunnel:
            yield Node(ztunnel, holder, control, listeners)
        holder.die()
        for each in listeners.values():
            each.close()


async def test_the_parent_starts_no_thread_and_imports_no_grpc(around: Node) -> None:
    await around.begin()
    pid = around.ztunnel.pid
    assert len(os.listdir(f"/proc/{pid}/task")) == 1
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "cygrpc" not in maps
    control = await around.ztunnel.child("ztunnel-control")
    await around.ztunnel.until("/ready")
    assert "cygrpc" in Path(f"/proc/{control}/maps").read_text(), "or the look at the parent says nothing"


async def test_questions_are_answered_from_the_world_and_changes_are_pushed(around: Node) -> None:
    worker = await around.begin()
    await around.ztunnel.until("/ready")
    await worker.send(ROUTE)
    route = await worker.receive(Route)
    assert route.kind == "hbone" and route.hops[0].identities == (spiffe("cart"),)
    await worker.send(VERDICT)
    assert (await worker.receive(Verdict)).allow
    deny = policy("no-web", Action.DENY, from_account("web"))
    around.control.discovery.set_world(World.of(WORLD.workloads.values(), WORLD.services.values(), [deny]))
    denied = await worker.receive(Verdict)
    assert (denied.allow, denied.policy) == (False, "shop/no-web")


async def test_a_worker_gets_what_is_its_own_and_no_dns_listeners(around: Node) -> None:
    worker = await around.begin()
    assert worker.given is not None
    assert worker.given.pods[WEB.uid] == (
        "netns",
        "outbound4",
        "outbound6",
        "plaintext4",
        "plaintext6",
        "hbone4",
        "hbone6",
    )


async def test_certificates_of_local_pods_are_fetched_ahead_and_others_are_refused(around: Node) -> None:
    worker = await around.begin()
    await around.ztunnel.until("/certificates", contains="Available")
    await worker.send(AskCertificate(identity=spiffe("web")))
    certificate = await worker.receive(Certificate, identity=spiffe("web"))
    assert certificate.error == "" and certificate.key_pem.startswith(b"-----BEGIN PRIVATE KEY")
    assert certificate.not_after - certificate.not_before > 3600
    await worker.send(AskCertificate(identity=spiffe("eve")))
    assert "no enrolled pod" in (await worker.receive(Certificate, identity=spiffe("eve"))).error
    dump = json.loads((await around.ztunnel.get("/certificates"))[1])
    assert {c["identity"]: c["state"] for c in dump} == {spiffe("web"): "Available", spiffe("cart"): "Available"}
    assert "PRIVATE" not in json.dumps(dump)


async def test_a_killed_control_process_is_replaced_and_the_worker_asks_it_again(around: Node) -> None:
    worker = await around.begin()
    await around.ztunnel.until("/ready")
    await worker.send(ROUTE)
    before = await worker.receive(Route)
    control = await around.ztunnel.child("ztunnel-control")
    os.kill(control, signal.SIGKILL)
    given = await worker.receive(Given, channels=2)
    assert set(given.pods) == {WEB.uid, CART.uid}
    again = await worker.receive(Route)
    assert again.generation > before.generation, "or the worker would keep the old answer for ever"
    assert again.hops == before.hops
    assert await around.ztunnel.child("ztunnel-control", other_than=control) != control
    await around.ztunnel.until("/ready")
    around.control.discovery.set_world(World.of([workload("web-1", "10.0.0.1")]))
    assert (await worker.receive(Route)).kind == "tcp", "and changes are pushed as before"


async def test_a_killed_worker_is_replaced_and_gets_every_pod_and_its_own_stream(around: Node) -> None:
    worker = await around.begin()
    await around.ztunnel.until("/ready")
    assert worker.given is not None
    os.kill(worker.given.pid, signal.SIGKILL)
    await around.ztunnel.child("ztunnel-w0", other_than=worker.given.pid)
    fresh = await TestWorker(Path(around.ztunnel.settings.run_dir)).connect()
    given = await fresh.receive(Given, snapshot=True)
    assert set(given.pods) == {WEB.uid, CART.uid}
    await fresh.send(ROUTE)
    assert (await fresh.receive(Route)).kind == "hbone"


async def test_a_new_holder_gets_the_descriptors_back(around: Node) -> None:
    worker = await around.begin()
    around.holder.die()
    successor = Holder(Path(around.ztunnel.settings.run_dir))
    hello = await successor.accept()
    assert set(hello.holds) == {WEB.uid, CART.uid}
    await successor.send(node.ReturnPods(uids=(CART.uid, "uid-unknown")))
    put, fds = await successor.receive()
    assert (put.pod, put.fds) == (CART, around.listeners[CART.uid].names)
    inodes = [os.fstat(fd).st_ino for fd in fds]
    assert inodes == [os.fstat(fd).st_ino for fd in around.listeners[CART.uid].fds]
    for fd in fds:
        os.close(fd)
    # a snapshot that tells again what is here is acknowledged and bothers nobody
    assert await successor.put(WEB, around.listeners[WEB.uid]) == node.Ack(uid=WEB.uid)
    await worker.send(ROUTE)
    assert (await worker.receive(Route)).kind == "hbone"
    successor.die()


async def test_a_removed_pod_leaves_no_listener_open_in_any_process(around: Node) -> None:
    worker = await around.begin()
    await around.ztunnel.until("/ready")
    inode = os.fstat(around.listeners[CART.uid].sockets["hbone4"].fileno()).st_ino
    dns = os.fstat(around.listeners[CART.uid].sockets["dns_udp4"].fileno()).st_ino

    def holders() -> int:
        found = 0
        for pid in (around.ztunnel.pid, *around.ztunnel.children().values()):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                try:
                    found += os.readlink(fd) in (f"socket:[{inode}]", f"socket:[{dns}]")
                except OSError:
                    continue
        return found

    assert holders() == 4, "the parent has both, the worker one, the control process one"
    await around.holder.send(node.PodRemove(uid=CART.uid, drain_s=0))
    assert await around.holder.ack() == node.Ack(uid=CART.uid)
    await worker.receive(Given, pods={WEB.uid: worker.given.pods[WEB.uid]} if worker.given else {})
    await until(lambda: holders() == 0, "the listeners are closed")


async def test_a_pod_that_a_worker_cannot_serve_is_reported_to_the_holder(around: Node) -> None:
    await around.begin()
    listeners = Listeners()
    ack = await around.holder.put(pod("unloved", "10.0.0.9"), listeners)
    assert ack.error == "ztunnel-w0: unloved"
    bad = await around.holder.put(pod("bad-1", "nonsense"), listeners)
    assert "ztunnel-control" in bad.error and "nonsense" in bad.error
    listeners.close()


async def test_dns_is_answered_on_the_descriptors_of_the_pod(around: Node) -> None:
    await around.begin()
    await around.ztunnel.until("/ready")
    loop = asyncio.get_running_loop()
    question = build_query(9, Question("cart.shop.svc.cluster.local", TYPE_A))
    for name in ("dns_udp4", "dns_udp6"):
        address = around.listeners[WEB.uid].address(name)
        with socket.socket(socket.AF_INET6 if name[-1] == "6" else socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.setblocking(False)
            client.connect(address)
            await loop.sock_sendall(client, question)
            async with asyncio.timeout(10):
                answer = await loop.sock_recv(client, 512)
        assert answers_of(answer) == [("cart.shop.svc.cluster.local", TYPE_A, 30, b"\x0a\x60\0\x0a")]
    for name in ("dns_tcp4", "dns_tcp6"):
        reader, writer = await asyncio.open_connection(*around.listeners[WEB.uid].address(name))
        writer.write(len(question).to_bytes(2, "big") + question)
        async with asyncio.timeout(10):
            size = int.from_bytes(await reader.readexactly(2), "big")
            assert answers_of(await reader.readexactly(size))
        writer.close()


async def test_events_become_metrics_and_access_log_lines(around: Node) -> None:
    worker = await around.begin()
    await around.ztunnel.until("/ready")

    def event(kind: str, connection: int, **more: object) -> ConnectionEvent:
        values: dict[str, object] = {
            "connection": connection,
            "event": kind,
            "reporter": "destination",
            "local": CART.uid,
            "source_address": "10.0.0.1:40000",
            "destination_address": "10.0.0.2:8080",
            "hbone_address": "10.0.0.2:15008",
            "source_identity": spiffe("web"),
            "destination_identity": spiffe("cart"),
            "protocol": "hbone",
            "at": 1.0,
        }
        return ConnectionEvent(**{**values, **more})  # type: ignore[arg-type]

    await worker.send(
        Events(
            events=(
                event("opened", 1),
                event("progress", 1, sent=10, received=5),
                event("closed", 1, sent=1, received=2, duration_ms=12.0),
                event("denied", 2, policy="shop/no-web", flags="DENY"),
            ),
            counters={"tunnels_opened": 3},
        )
    )
    text = await around.ztunnel.until("/stats/prometheus", contains="istio_tcp_connections_failed_total{")
    assert 'ambient_ztunnel_events_total{name="tunnels_opened"} 3.0' in text
    (sent,) = [
        line for line in text.splitlines() if line.startswith("istio_tcp_sent_bytes_total{") and 'flags="-"' in line
    ]
    assert sent.endswith(" 11.0") and 'destination_service="cart.shop.svc.cluster.local"' in sent
    log = around.ztunnel.log.read_text()
    assert "bytes_sent=11 bytes_recv=7" in log
    assert 'error="connection closed due to policy rejection: explicitly denied by: shop/no-web"' in log


async def test_the_admin_endpoint_shows_the_whole_state(around: Node) -> None:
    worker = await around.begin()
    await around.ztunnel.until("/ready")
    await worker.send(ROUTE)
    await worker.receive(Route)
    dump = json.loads((await around.ztunnel.get("/config_dump"))[1])
    assert {"workloads", "services", "policies", "certificates", "version", "config", "workloadState"} <= set(dump)
    assert [w["name"] for w in dump["workloads"]] == ["cart-1", "web-1"]
    assert list(dump["workloadState"]) == [WEB.uid, CART.uid]
    assert dump["decisions"]["routes"][0]["kind"] == "hbone"
    async with around.ztunnel.http() as session:
        async with session.post("/logging?level=debug") as response:
            assert (response.status, await response.text()) == (200, "current log level is debug\n")
        async with session.post("/logging?level=loud") as response:
            assert response.status == 400 and "loud" in await response.text()
        async with session.get("/logging?level=info") as response:
            assert response.status == 405


async def test_before_its_first_world_it_is_not_ready_and_says_why(around: Node) -> None:
    await around.control.server.stop()
    await around.holder.accept()
    text = await around.ztunnel.until("/ready", status=500, contains="workload proxy manager")
    assert "state manager" in text


async def test_sigterm_ends_every_process_with_code_0(around: Node) -> None:
    await around.begin()
    await around.ztunnel.until("/ready")
    children = list(around.ztunnel.children().values())
    assert await around.ztunnel.stop() == 0
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert not (Path(around.ztunnel.settings.run_dir) / "ztunnel.sock").exists()


async def test_a_killed_parent_takes_its_children_with_it(around: Node) -> None:
    await around.begin()
    await around.ztunnel.until("/ready")
    children = list(around.ztunnel.children().values())
    os.kill(around.ztunnel.pid, signal.SIGKILL)
    await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), "the children end")
