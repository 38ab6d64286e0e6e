"""``python -m ztunnel`` as it is: parent, real workers, control process, beside a real control plane."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import pytest
from cryptography import x509

from ambient.control.certificates import PodFacts
from ambient.io.ca_client import create_certificate, key_pem, make_csr, make_key
from ambient.model.policy import Action
from ambient.model.world import World
from ambient.node import messages as node
from tests.support.control import ControlPlane, Now
from tests.support.shop import from_account, pod, policy, spiffe, workload
from tests.support.ztunnel import Holder, Listeners, Ztunnel

CART, WEB = pod("cart-1", "127.0.0.1"), pod("web-1", "10.0.0.1")
ONLY_EVE = policy("only-eve", Action.ALLOW, from_account("eve"))
WORLD = World.of([workload("cart-1", "127.0.0.1"), workload("web-1", "10.0.0.1")], (), [ONLY_EVE])


class Here:
    """A node with the pod ``cart-1``, whose HBONE listener is on loopback."""

    def __init__(self, directory: Path, control: ControlPlane) -> None:
        self.directory = directory
        self.control = control
        self.run_dir = directory / "run"
        self.run_dir.mkdir()
        self.settings = control.node(
            run_dir=str(self.run_dir),
            bpffs_dir=str(directory / "bpffs"),
            ztunnel_workers=2,
            admin_port=0,
            metrics_port=0,
            readiness_port=0,
            drain_s=1.0,
        )
        control.pods["n1"] += [PodFacts(f"uid-{n}-1", f"{n}-1", "shop", n) for n in ("web", "cart")]
        self.listeners = Listeners()
        self.holder = Holder(self.run_dir)
        self.ztunnel = Ztunnel(directory, self.settings, "ztunnel")

    async def begin(self) -> None:
        await self.holder.accept()
        assert await self.holder.put(CART, self.listeners) == node.Ack(uid=CART.uid)
        await self.holder.send(node.SnapshotSent())
        await self.ztunnel.until("/ready")

    async def context(self, account: str) -> ssl.SSLContext:
        """A client's TLS with a certificate of the mesh for this account."""
        key = make_key()
        chain = await create_certificate(self.settings, spiffe(account), make_csr(key, spiffe(account)), 3600)
        file = self.directory / "client.pem"
        file.write_bytes(key_pem(key) + "".join(chain[:-1]).encode())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(cadata=chain[-1])
        context.load_cert_chain(file)
        context.set_alpn_protocols(["h2"])
        return context

    async def connect(self, account: str, authority: str) -> tuple[str, str]:
        """The server's SPIFFE ID and the status of a CONNECT."""
        reader, writer = await asyncio.open_connection(
            *self.listeners.address("hbone4"), ssl=await self.context(account)
        )
        raw = writer.get_extra_info("ssl_object").getpeercert(True)
        names = x509.load_der_x509_certificate(raw).extensions.get_extension_for_class(x509.SubjectAlternativeName)
        (server,) = names.value.get_values_for_type(x509.UniformResourceIdentifier)
        connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="ascii"))
        connection.initiate_connection()
        connection.send_headers(1, [(":method", "CONNECT"), (":authority", authority)])
        writer.write(connection.data_to_send())
        async with asyncio.timeout(15):
            while True:
                data = await reader.read(65536)
                assert data, "the tunnel ended"
                for event in connection.receive_data(data):
                    if isinstance(event, h2.events.ResponseReceived):
                        writer.close()
                        return server, dict(event.headers)[":status"]
                writer.write(connection.data_to_send())


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Here]:
    async with ControlPlane(tmp_path, Now(time.time())) as control:
        control.discovery.set_world(WORLD)
        found = Here(tmp_path, control)
        async with found.ztunnel:
            yield found
        found.holder.die()
        found.listeners.close()


async def test_a_policy_of_the_control_plane_decides_at_the_tunnel_and_is_logged_by_name(here: Here) -> None:
    await here.begin()
    assert await here.connect("web", "127.0.0.1:8080") == (spiffe("cart"), "401")
    text = await here.ztunnel.until("/metrics", contains='response_flags="DENY"')
    assert "istio_tcp_connections_failed_total{" in text
    assert "allow policies exist, but none allowed" in here.ztunnel.log.read_text()
    no_web = policy("no-web", Action.DENY, from_account("web"))
    here.control.discovery.set_world(World.of(WORLD.workloads.values(), (), [no_web]))
    await here.ztunnel.until("/config_dump", contains="no-web")
    assert await here.connect("web", "127.0.0.1:8080") == (spiffe("cart"), "401")
    await here.ztunnel.until("/metrics", contains='response_flags="DENY"')
    async with asyncio.timeout(10):
        while "explicitly denied by: shop/no-web" not in here.ztunnel.log.read_text():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    # allowed now, and past the verdict: the kernel maps that a delivery needs are not here, so it is unavailable
    here.control.discovery.set_world(World.of(WORLD.workloads.values()))
    await here.ztunnel.until("/config_dump", contains='"policies": []')
    assert await here.connect("web", "127.0.0.1:8080") == (spiffe("cart"), "503")


async def test_tunnels_go_on_being_served_whichever_process_is_killed(here: Here) -> None:
    await here.begin()
    for name in ("ztunnel-control", "ztunnel-w0", "ztunnel-w1"):
        pid = await here.ztunnel.child(name)
        os.kill(pid, signal.SIGKILL)
        assert await here.connect("web", "127.0.0.1:8080") == (spiffe("cart"), "401")
        await here.ztunnel.child(name, other_than=pid)
    await here.ztunnel.until("/ready")


async def test_with_the_control_plane_away_what_is_known_still_serves(here: Here) -> None:
    await here.begin()
    context = await here.context("web")
    await here.control.server.stop()
    here.context = lambda account: asyncio.sleep(0, context)  # type: ignore[method-assign]
    assert await here.connect("web", "127.0.0.1:8080") == (spiffe("cart"), "401")
    assert (await here.ztunnel.get("/ready"))[0] == 200


async def test_connections_are_listed_from_every_worker(here: Here) -> None:
    await here.begin()
    _, writer = await asyncio.open_connection(*here.listeners.address("hbone4"), ssl=await here.context("web"))
    found = json.loads(await here.ztunnel.until("/connections", contains=spiffe("web")))
    assert [t["role"] for t in found["tunnels"]] == ["server"] and found["connections"] == []
    writer.close()


async def test_the_pid_file_names_the_parent_unless_another_lives(here: Here) -> None:
    await here.begin()
    file = here.run_dir / "ztunnel.pid"
    assert int(file.read_text()) == here.ztunnel.pid
    await here.ztunnel.stop()
    assert not file.exists()
    file.write_text(f"{os.getpid()}\n")
    here.holder.die()
    here.ztunnel.start()
    await here.ztunnel.until("/ready", status=500)
    assert int(file.read_text()) == os.getpid(), "an upgrade's holder decides whose it is"
