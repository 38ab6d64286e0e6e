"""API server, control plane, and real subscribers over TLS with tokens of real pods: what a node sees of a change."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from cryptography import x509

from ambient.errors import PeerFault
from ambient.io.ca_client import create_certificate, make_csr, make_key
from ambient.io.mesh_client import await_acknowledged
from ambient.io.run_control import ControlPlane
from ambient.io.xds_client import subscribe
from ambient.manifest.kinds import NAMESPACE, PEER_AUTHENTICATION
from ambient.model.world import Diff, World
from ambient.settings import NodeSettings
from tests.support.control_plane import Cluster, Running, running_cluster, until

STRICT = "istio-system/istio_converted_static_strict"
UID = "Kubernetes//Pod/shop/web"


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with running_cluster() as made:
        await made.client.create(NAMESPACE, {"metadata": {"name": "ambient-system"}})
        strict = {"metadata": {"name": "default"}, "spec": {"mtls": {"mode": "STRICT"}}}
        await made.client.create(PEER_AUTHENTICATION, strict, "shop")
        await made.pod("web", "10.1.0.1")
        yield made


async def settings_of(cluster: Cluster, plane: ControlPlane, node: str) -> NodeSettings:
    """What a node's processes are told; the token is of an agent pod that is bound to the node."""
    name = f"ambient-node-{node}"
    await cluster.pod(name, "192.0.2.1", "ambient-system", node, account="ambient-node", host_network=True)
    pod = json.loads(await cluster.client.request("GET", f"/api/v1/namespaces/ambient-system/pods/{name}"))
    bound = {"kind": "Pod", "apiVersion": "v1", "name": name, "uid": pod["metadata"]["uid"]}
    path = "/api/v1/namespaces/ambient-system/serviceaccounts/ambient-node/token"
    body = {"spec": {"audiences": ["istio-ca"], "boundObjectRef": bound}}
    answer = json.loads(await cluster.client.request("POST", path, body=body))
    (cluster.directory / f"{node}.token").write_text(answer["status"]["token"])
    (cluster.directory / "root.pem").write_text(plane.authority.bundle_pem)
    assert plane.server is not None
    return NodeSettings(
        node_name=node,
        control_address=f"127.0.0.1:{plane.server.ports[0]}",
        control_server_name="localhost",
        ca_root_file=str(cluster.directory / "root.pem"),
        token_file=str(cluster.directory / f"{node}.token"),
    )


class Subscriber:
    """A node's subscription; remembers every form of the workload it was given, and can be made to dawdle."""

    def __init__(self, settings: NodeSettings) -> None:
        self.settings = settings
        self.forms: list[tuple[bool, tuple[str, ...]]] = []
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self.synced = False

    async def change(self, world: World, _: Diff) -> None:
        self.synced = True
        workload = world.workloads.get(UID)
        if workload is not None and (not self.forms or self.forms[-1] != (workload.enrolled, workload.policies)):
            self.forms.append((workload.enrolled, workload.policies))
        assert all(key in world.policies for w in world.workloads.values() for key in w.policies)
        await self.may_go_on.wait()

    async def __aenter__(self) -> Subscriber:
        self.task = asyncio.create_task(subscribe(self.settings, "ztunnel", self.change))
        await until(lambda: self.synced or self.task.done())
        assert not self.task.done(), self.task
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def test_every_node_learns_of_hbone_before_any_learns_of_strict(cluster: Cluster) -> None:
    async with Running(cluster, acknowledge_timeout_s=30.0) as plane:
        nodes = [await settings_of(cluster, plane, name) for name in ("n1", "n2")]
        async with Subscriber(nodes[0]) as quick, Subscriber(nodes[1]) as slow:
            assert quick.forms == slow.forms == [(False, ())]
            slow.may_go_on.clear()
            await cluster.redirection("web", "enabled")
            await until(lambda: quick.forms[-1][0] and slow.forms[-1][0])
            await until(lambda: plane.discovery.acknowledged(UID, True) == ("n2",))
            assert plane.reconciler.delay.waiting == (UID,)
            assert quick.forms == [(False, ()), (True, ())]
            slow.may_go_on.set()
            await until(lambda: quick.forms[-1] == slow.forms[-1] == (True, (STRICT,)))
            assert quick.forms == slow.forms == [(False, ()), (True, ()), (True, (STRICT,))]
            assert plane.reconciler.delay.timeouts_total == 0
            # and the way back takes both away at once
            await cluster.redirection("web", None)
            assert await await_acknowledged(nodes[0], UID, False, 5.0)
            assert quick.forms[-1] == slow.forms[-1] == (False, ())


async def test_the_agent_can_wait_for_everybody_and_is_told_when_somebody_dawdles(cluster: Cluster) -> None:
    async with Running(cluster) as plane:
        nodes = [await settings_of(cluster, plane, name) for name in ("n1", "n2")]
        async with Subscriber(nodes[0]), Subscriber(nodes[1]) as slow:
            await cluster.redirection("web", "enabled")
            assert await await_acknowledged(nodes[0], UID, True, 5.0)
            slow.may_go_on.clear()
            await cluster.redirection("web", None)
            assert not await await_acknowledged(nodes[0], UID, False, 0.3)
            slow.may_go_on.set()
            assert await await_acknowledged(nodes[0], UID, False, 5.0)


async def test_a_node_gets_identities_of_its_own_pods_only(cluster: Cluster) -> None:
    await cluster.pod("db", "10.1.0.2", node="n2", account="db")
    async with Running(cluster) as plane:
        first = await settings_of(cluster, plane, "n1")
        await until(lambda: len(plane.reconciler.pods_on("n1")) == 2)
        ours, theirs = "spiffe://cluster.local/ns/shop/sa/default", "spiffe://cluster.local/ns/shop/sa/db"
        key = make_key()
        chain = await create_certificate(first, ours, make_csr(key, ours), 3600)
        names = x509.load_pem_x509_certificate(chain[0].encode()).extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
        assert names.value.get_values_for_type(x509.UniformResourceIdentifier) == [ours]
        with pytest.raises(PeerFault, match="PERMISSION_DENIED"):
            await create_certificate(first, theirs, make_csr(key, theirs), 3600)
        # an application's own token is no node's
        body: dict[str, Any] = {"spec": {"audiences": ["istio-ca"]}}
        path = "/api/v1/namespaces/shop/serviceaccounts/default/token"
        answer = json.loads(await cluster.client.request("POST", path, body=body))
        (cluster.directory / "n1.token").write_text(answer["status"]["token"])
        with pytest.raises(PeerFault, match="PERMISSION_DENIED"):
            await create_certificate(first, theirs, make_csr(key, theirs), 3600)


async def test_certificates_and_discovery_go_on_without_the_api_server(cluster: Cluster) -> None:
    async with Running(cluster) as plane:
        node = await settings_of(cluster, plane, "n1")
        await until(lambda: len(plane.reconciler.pods_on("n1")) == 2)
        async with Subscriber(node):
            await cluster.api.stop()
            await until(lambda: all(r.failures for r in plane.reflectors))
            ours = "spiffe://cluster.local/ns/shop/sa/default"
            await create_certificate(node, ours, make_csr(make_key(), ours), 3600)
            async with Subscriber(node) as late:
                assert late.forms == [(False, ())]
