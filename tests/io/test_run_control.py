"""The control plane as a whole, against the lab's API server: objects in, World, statuses and trust bundle out."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ambient.io.kube import KubeClient
from ambient.io.kube_answers import ApiStatus
from ambient.io.run_control import ControlPlane
from ambient.io.token_review import TokenReviewer
from ambient.manifest.kinds import AUTHORIZATION_POLICY, CONFIG_MAP, KINDS, NAMESPACE, PEER_AUTHENTICATION, POD
from ambient.model.workload import TunnelProtocol
from ambient.settings import ControlSettings
from tests.support.control_plane import Cluster, Running, eventually, free_socket, running_cluster, until

STRICT = "istio-system/istio_converted_static_strict"


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with running_cluster() as made:
        yield made


async def test_pods_services_and_policies_become_the_world(cluster: Cluster) -> None:
    async with Running(cluster) as plane:
        await cluster.pod("web", "10.1.0.1", app="web")
        service = {"spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]}}
        await cluster.client.create(KINDS["Service"], {"metadata": {"name": "web"}} | service, "shop")
        target = {"kind": "Pod", "namespace": "shop", "name": "web"}
        endpoints = {
            "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4",
            "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
            "endpoints": [{"addresses": ["10.1.0.1"], "targetRef": target}],
        }
        await cluster.client.create(KINDS["EndpointSlice"], endpoints, "shop")
        world = plane.discovery.store

        def endpoint() -> Any:
            found = world.world.services.get("shop/web.shop.svc.cluster.local")
            return found and world.world.endpoints(found, 80)

        await until(endpoint)
        assert [(e.workload.name, e.port.target_port) for e in endpoint()] == [("web", 8080)]
        await cluster.client.delete(POD, "web", "shop", grace_period_s=0)
        await until(lambda: not world.world.workloads)


async def test_the_trust_bundle_is_in_every_namespace_and_is_repaired(cluster: Cluster) -> None:
    async with Running(cluster) as plane:

        async def bundle(namespace: str) -> str:
            try:
                found = await cluster.client.get(CONFIG_MAP, "istio-ca-root-cert", namespace)
            except ApiStatus:
                return ""
            return (found.data or {}).get("root-cert.pem", "")

        assert await eventually(lambda: bundle("shop")) == plane.authority.bundle_pem
        await cluster.client.create(NAMESPACE, {"metadata": {"name": "later"}})
        assert await eventually(lambda: bundle("later")) == plane.authority.bundle_pem
        await cluster.client.patch(CONFIG_MAP, "istio-ca-root-cert", {"data": {"root-cert.pem": "forged"}}, "shop")

        async def repaired() -> bool:
            return await bundle("shop") == plane.authority.bundle_pem

        await eventually(repaired)


async def test_a_policy_is_told_whether_ztunnels_enforce_it(cluster: Cluster) -> None:
    async with Running(cluster):
        for name, rule in (
            ("good", {"from": [{"source": {"namespaces": ["a"]}}]}),
            ("http", {"to": [{"operation": {"methods": ["GET"]}}]}),
        ):
            body = {"metadata": {"name": name}, "spec": {"action": "ALLOW", "rules": [rule]}}
            await cluster.client.create(AUTHORIZATION_POLICY, body, "shop")

        async def condition(name: str) -> Any:
            item = await cluster.client.get(AUTHORIZATION_POLICY, name, "shop")
            return item.status and item.status["conditions"][0]

        good, http = await eventually(lambda: condition("good")), await eventually(lambda: condition("http"))
        assert (good["type"], good["status"], good["reason"]) == ("ZtunnelAccepted", "True", "Accepted")
        assert (http["status"], http["reason"]) == ("False", "UnsupportedValue")
        assert "spec.rules[0].to[0].operation.methods" in http["message"]


async def test_without_subscribers_strict_follows_the_annotation_at_once(cluster: Cluster) -> None:
    strict = {"metadata": {"name": "default"}, "spec": {"mtls": {"mode": "STRICT"}}}
    await cluster.client.create(PEER_AUTHENTICATION, strict, "shop")
    await cluster.pod("web", "10.1.0.1")
    async with Running(cluster) as plane:
        store = plane.discovery.store
        workload = next(iter(store.world.workloads.values()))
        assert workload.protocol is TunnelProtocol.NONE and workload.policies == ()
        await cluster.redirection("web", "enabled")
        await until(lambda: store.world.workloads[workload.uid].policies == (STRICT,))
        assert plane.reconciler.delay.timeouts_total == 0
        await cluster.redirection("web", None)
        await until(lambda: store.world.workloads[workload.uid].policies == ())
        assert not store.world.workloads[workload.uid].enrolled


async def test_a_subscriber_that_does_not_acknowledge_delays_strict_until_the_time_is_up(cluster: Cluster) -> None:
    strict = {"metadata": {"name": "default"}, "spec": {"mtls": {"mode": "STRICT"}}}
    await cluster.client.create(PEER_AUTHENTICATION, strict, "shop")
    await cluster.pod("web", "10.1.0.1")
    async with Running(cluster, acknowledge_timeout_s=0.3) as plane:
        store = plane.discovery.store
        uid = next(iter(store.world.workloads))
        silent = plane.discovery.open("n9")
        await cluster.redirection("web", "enabled")
        await until(lambda: store.world.workloads[uid].enrolled)
        assert store.world.workloads[uid].policies == ()
        assert plane.reconciler.delay.waiting == (uid,)
        await until(lambda: store.world.workloads[uid].policies == (STRICT,))
        assert plane.reconciler.delay.timeouts_total == 1
        plane.discovery.close(silent)


async def test_the_last_world_serves_while_the_api_server_is_away(cluster: Cluster) -> None:
    await cluster.pod("web", "10.1.0.1")
    async with Running(cluster) as plane:
        await cluster.api.stop()
        await until(lambda: all(r.failures for r in plane.reflectors))
        assert len(plane.discovery.store.world.workloads) == 1
        assert plane.not_ready() == ()
        assert plane.server is not None


async def test_a_policy_that_cannot_be_read_keeps_its_last_good_form(cluster: Cluster) -> None:
    body: dict[str, Any] = {"metadata": {"name": "p"}, "spec": {"action": "DENY", "rules": [{}]}}
    async with Running(cluster) as plane:
        await cluster.client.create(AUTHORIZATION_POLICY, body, "shop")
        store = plane.discovery.store
        await until(lambda: "shop/p" in store.world.policies)
        good = store.world.policies["shop/p"]
        bad = [
            {"op": "replace", "path": "/spec/action", "value": "ALLOW"},
            {"op": "add", "path": "/spec/x", "value": 1},
        ]
        await cluster.client.patch(AUTHORIZATION_POLICY, "p", bad, "shop", how="json")
        await until(lambda: plane.reconciler.problems)
        assert "spec.x" in str(plane.reconciler.problems[0])
        assert store.world.policies["shop/p"] == good


async def test_the_admin_endpoint_shows_what_is_held(cluster: Cluster) -> None:
    await cluster.pod("web", "10.1.0.1")
    listener = free_socket()
    port = listener.getsockname()[1]
    listener.close()
    plane = ControlPlane(cluster.settings(), KubeClient.from_settings(str(cluster.kubeconfig)))
    plane.settings = ControlSettings(
        kubeconfig=str(cluster.kubeconfig),
        listen=("127.0.0.1:0",),
        data_dir=str(cluster.directory / "data"),
        admin_listen=f"127.0.0.1:{port}",
    )
    task = asyncio.create_task(plane.run())
    async with aiohttp.ClientSession() as session:

        async def get(path: str) -> tuple[int, str]:
            async with session.get(f"http://127.0.0.1:{port}{path}") as response:
                return response.status, await response.text()

        async def ready() -> bool:
            try:
                return (await get("/healthz/ready"))[0] == 200
            except aiohttp.ClientError:
                return False

        await eventually(ready)
        world = json.loads((await get("/debug/world"))[1])
        assert world["workloads"]["Kubernetes//Pod/shop/web"]["addresses"] == ["10.1.0.1"]
        assert world["workloads"]["Kubernetes//Pod/shop/web"]["protocol"] == "NONE"
        assert json.loads((await get("/debug/problems"))[1])["objects"] == []
        assert json.loads((await get("/debug/subscribers"))[1]) == []
        metrics = (await get("/metrics"))[1]
        assert 'ambient_control_world{type="workloads"} 1.0' in metrics
        assert 'ambient_control_objects{kind="Pod"} 1.0' in metrics
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_two_replicas_elect_one_leader_and_the_other_takes_over(cluster: Cluster) -> None:
    await cluster.client.create(NAMESPACE, {"metadata": {"name": "ambient-system"}})
    async with Running(cluster, leader_election=True) as first:
        await until(lambda: first.leading)
        second = ControlPlane(cluster.settings(leader_election=True), KubeClient.from_settings(str(cluster.kubeconfig)))
        assert second._election is not None and first._election is not None
        second._election.identity = "second"
        second._election._retry_s = 0.05
        task = asyncio.create_task(second.run())
        await until(lambda: second.publishes_total > 0)
        await until(lambda: second._election is not None and second._election.holder == first._election.identity)
        assert not second.leading and second.server is None
        await first._election.release()
        await until(lambda: second.leading and second.server is not None)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_pods_token_names_its_account_pod_and_node(cluster: Cluster) -> None:
    await cluster.pod("web", "10.1.0.1")
    pod = await cluster.client.get(POD, "web", "shop")
    bound = {"kind": "Pod", "apiVersion": "v1", "name": "web", "uid": pod.metadata.uid}

    async def token(audience: str) -> str:
        path = "/api/v1/namespaces/shop/serviceaccounts/default/token"
        spec = {"audiences": [audience], "boundObjectRef": bound}
        answer = await cluster.client.request("POST", path, body={"spec": spec})
        return str(json.loads(answer)["status"]["token"])

    reviewer = TokenReviewer(cluster.client)
    caller = await reviewer.review(await token("istio-ca"))
    assert caller is not None
    assert (caller.account, caller.pod_uid, caller.node_name) == ("shop/default", pod.metadata.uid, "n1")
    assert await reviewer.review(await token("somebody-else")) is None
    assert await reviewer.review("rubbish") is None


async def test_the_process_stops_on_sigterm_and_says_what_is_wrong_with_its_settings(cluster: Cluster) -> None:
    good, bad = cluster.directory / "good.yaml", cluster.directory / "bad.yaml"
    good.write_text(
        f"kubeconfig: {cluster.kubeconfig}\nlisten: ['127.0.0.1:0']\ndata_dir: {cluster.directory}/d\n"
        "admin_listen: 127.0.0.1:0\n"
    )
    bad.write_text("listn: []\n")

    async def start(path: Path) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "ambient.io.run_control", "--config", str(path)),
            stderr=asyncio.subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )

    refused = await start(bad)
    _, said = await refused.communicate()
    assert refused.returncode == 2 and b"listn" in said and b"bad.yaml" in said
    process = await start(good)
    assert process.stderr is not None
    async with asyncio.timeout(20):
        while b"serving discovery" not in await process.stderr.readline():
            pass
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
