"""A control plane in this process against the lab's API server, for tests that need both whole."""

from __future__ import annotations

import asyncio
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ambient.io.kube import KubeClient
from ambient.io.kube_answers import ApiStatus
from ambient.io.run_control import ControlPlane
from ambient.lab.apiserver.http import ApiServer, ApiSettings
from ambient.manifest.kinds import NAMESPACE, POD
from ambient.settings import ControlSettings


@dataclass
class Cluster:
    """An API server, a client of it with every right, and where its kubeconfig is."""

    api: ApiServer
    client: KubeClient
    kubeconfig: Path
    directory: Path

    async def pod(
        self,
        name: str,
        ip: str,
        namespace: str = "shop",
        node: str = "n1",
        account: str = "",
        host_network: bool = False,
        **labels: str,
    ) -> None:
        """Create a pod that is running and ready; its service account must exist in a namespace that has it."""
        if account:
            path = f"/api/v1/namespaces/{namespace}/serviceaccounts"
            try:
                await self.client.request("POST", path, body={"metadata": {"name": account}})
            except ApiStatus as status:
                assert status.code == 409
        await self.client.create(
            POD,
            {
                "metadata": {"name": name, "namespace": namespace, "labels": labels},
                "spec": {
                    "nodeName": node,
                    "hostNetwork": host_network,
                    "serviceAccountName": account or "default",
                    "containers": [{"name": "c", "image": "x"}],
                },
            },
            namespace,
        )
        ready = {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]}
        ready["conditions"] = [{"type": "Ready", "status": "True"}]  # type: ignore[assignment]
        await self.client.patch(POD, name, {"status": ready}, namespace, subresource="status")

    async def redirection(self, name: str, value: str | None) -> None:
        annotations = {"ambient.istio.io/redirection": value}
        await self.client.patch(POD, name, {"metadata": {"annotations": annotations}}, "shop")

    def settings(self, **changes: Any) -> ControlSettings:
        return ControlSettings(
            kubeconfig=str(self.kubeconfig),
            listen=("127.0.0.1:0",),
            data_dir=str(self.directory / "data"),
            admin_listen="127.0.0.1:0",
            server_names=("localhost", "127.0.0.1"),
            **changes,
        )


def free_socket() -> socket.socket:
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind(("127.0.0.1", 0))
    found.listen(64)
    return found


@asynccontextmanager
async def running_cluster() -> AsyncIterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="ambient-control-") as name:
        listener = free_socket()
        api = ApiServer([listener], ApiSettings())
        await api.start()
        path = Path(name) / "kubeconfig"
        path.write_text(api.kubeconfig(f"https://127.0.0.1:{listener.getsockname()[1]}"))
        client = KubeClient.from_settings(str(path))
        for namespace in ("shop", "istio-system"):
            try:
                await client.create(NAMESPACE, {"metadata": {"name": namespace}})
            except ApiStatus as status:
                assert status.code == 409
        yield Cluster(api, client, path, Path(name))
        await client.close()
        await api.stop()


class Running:
    """A control plane in a task."""

    def __init__(self, cluster: Cluster, **changes: Any) -> None:
        self.plane = ControlPlane(cluster.settings(**changes), KubeClient.from_settings(str(cluster.kubeconfig)))

    async def __aenter__(self) -> ControlPlane:
        self.task = asyncio.create_task(self.plane.run())
        await until(lambda: self.task.done() or not self.plane.not_ready())
        assert not self.task.done(), self.task
        return self.plane

    async def __aexit__(self, *_: object) -> None:
        assert not self.task.done(), self.task
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def until(condition: Callable[[], Any], limit_s: float = 10.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110 - the product has no event for each of these
            await asyncio.sleep(0.005)


async def eventually(question: Callable[[], Any], limit_s: float = 10.0) -> Any:
    """The first true answer of an awaitable question."""
    async with asyncio.timeout(limit_s):
        while not (answer := await question()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return answer
