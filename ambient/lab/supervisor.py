"""The one process behind a lab: API server, controllers, and for each node kubelet, kube-proxy and DNS.

`python -m ambient.lab.supervisor NAME --progress FD` reads lab.json, builds the networks, starts everything and
says each step on FD as a JSON line; ``{"ready": true}`` is the last one. It lives in the lab's own cgroup, so
`lab down` ends it with everything it started. It takes nothing down itself: ambient.lab.teardown does, by name.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec

from ambient.errors import AmbientError
from ambient.io.kube import KubeClient
from ambient.io.kube_answers import ApiStatus
from ambient.io.kube_auth import from_kubeconfig
from ambient.lab import cgroups, mesh, network, record
from ambient.lab.apiserver.http import ApiServer, ApiSettings
from ambient.lab.cluster import Cluster
from ambient.lab.cni import Chain
from ambient.lab.container import now_text
from ambient.lab.controllers.driver import run_controllers
from ambient.lab.dns_server import DnsServer
from ambient.lab.kube_proxy import KubeProxy
from ambient.lab.kubelet import Kubelet
from ambient.lab.process import KeptProcess
from ambient.lab.sockets import open_here, open_in_netns
from ambient.lab.topology import SERVICES4, SERVICES6, Lab, NodePlan
from ambient.manifest.kinds import NODE

log = logging.getLogger("ambient.lab")
API_PORT = 6443
_SERVICES_S = 10.0
_AGENT_S = 20.0


class Supervisor:
    """Construct, then `run` once."""

    def __init__(self, lab_record: record.LabRecord, progress_fd: int) -> None:
        self._record = lab_record
        self._lab: Lab = lab_record.plan()
        self._progress_fd = progress_fd
        self._directory = Path(self._lab.directory)
        self._logs = self._directory / "logs"
        self._processes: list[KeptProcess] = []

    def say(self, **fields: object) -> None:
        """One line of progress; nobody may be listening any more."""
        if self._progress_fd < 0:
            return
        try:
            os.write(self._progress_fd, json.dumps(fields).encode() + b"\n")
        except OSError:
            self._progress_fd = -1

    def build(self) -> None:
        """Everything that needs no event loop: cgroups, networks, mounts, CNI files."""
        lab = self._lab
        cgroups.enter(cgroups.create(lab.cgroup / "supervisor"))
        self._logs.mkdir(exist_ok=True)
        self.say(step=f"networks of {lab.nodes} nodes")
        network.create(lab)
        if self._record.mesh:
            Path(lab.bpffs).mkdir(exist_ok=True)
            subprocess.run(["mount", "-t", "bpf", "-o", "mode=0700", f"lab-{lab.name}", str(lab.bpffs)], check=True)
        for node in lab.plans():
            for cgroup in node.cgroups:
                cgroups.create(cgroup)
            mesh.install_cni(node, self._record.mesh)

    async def run(self) -> None:
        """Until SIGTERM."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        api = await self._start_api()
        client = KubeClient(from_kubeconfig(str(self._lab.kubeconfig)))
        try:
            async with asyncio.TaskGroup() as group:
                await self._start(group, api, client)
                self._record = msgspec.structs.replace(self._record, ready=True)
                record.write(self._record)
                self.say(ready=True)
                await stop.wait()
                raise _Stopped
        except* _Stopped:
            pass
        finally:
            await client.close()
            await api.stop()

    async def _start_api(self) -> ApiServer:
        lab = self._lab
        self.say(step="API server")
        here = open_here("127.0.0.1", 0)
        underlay = [open_in_netns(lab.underlay_netns, lab.control4, API_PORT)]
        if lab.ipv6:
            underlay.append(open_in_netns(lab.underlay_netns, lab.control6, API_PORT))
        ranges = (str(SERVICES4), str(SERVICES6)) if lab.ipv6 else (str(SERVICES4),)
        settings = ApiSettings(
            service_ranges=ranges,
            advertise=tuple((str(sock.getsockname()[0]), API_PORT) for sock in underlay),
        )
        api = ApiServer([here, *underlay], settings)
        await api.start()
        port = int(here.getsockname()[1])
        for path, url in (
            (lab.kubeconfig, f"https://127.0.0.1:{port}"),
            (lab.node_kubeconfig, f"https://{lab.control4}:{API_PORT}"),
        ):
            _write_private(Path(path), api.kubeconfig(url, name=f"lab-{lab.name}"))
        self._record = msgspec.structs.replace(self._record, api_port=port, supervisor_pid=os.getpid())
        record.write(self._record)
        return api

    async def _start(self, group: asyncio.TaskGroup, api: ApiServer, client: KubeClient) -> None:
        lab = self._lab
        group.create_task(run_controllers(api.store), name="controllers")
        await self._create_objects(client)
        cluster = Cluster(client)
        group.create_task(cluster.run(), name="cluster")
        self.say(step="mesh processes" if self._record.mesh else "no mesh")
        if self._record.mesh:
            await self._start_mesh(group, client)
        self.say(step="kubelets, kube-proxies and DNS")
        proxies = [self._start_node(group, node, client, cluster) for node in lab.plans()]
        async with asyncio.timeout(_SERVICES_S):
            await asyncio.gather(*(proxy.synced.wait() for proxy in proxies))
        if self._record.mesh:
            self.say(step="agents load their programs")
            await asyncio.gather(*(self._agent_answers(node) for node in lab.plans()))

    def _start_node(self, group: asyncio.TaskGroup, node: NodePlan, client: KubeClient, cluster: Cluster) -> KubeProxy:
        lab = self._lab
        dns = DnsServer(cluster)
        dns.open(node.netns, lab.dns_addresses)
        group.create_task(dns.run(), name=f"DNS of {node.name}")
        proxy = KubeProxy(node, cluster, frozenset(lab.dns_addresses))
        group.create_task(proxy.run(), name=f"kube-proxy of {node.name}")
        files = mesh.files_of(node)
        chain = Chain(node.netns, files.cni_config, files.cni_bin, {"PATH": os.environ.get("PATH", os.defpath)})
        kubelet = Kubelet(lab, node, client, chain, self._record.images)
        group.create_task(kubelet.run(), name=f"kubelet of {node.name}")
        return proxy

    async def _start_mesh(self, group: asyncio.TaskGroup, client: KubeClient) -> None:
        lab = self._lab
        await mesh.create_system(client)
        for node in lab.plans():
            account = mesh.NodeAccount(node, client)
            await account.create()
            group.create_task(account.run(), name=f"token of {node.name}")
        self._processes = [mesh.control_process(lab, self._logs)]
        self._processes += [mesh.holder_process(lab, node, self._logs) for node in lab.plans()]
        for process in self._processes:
            group.create_task(process.run(), name=process.name)

    async def _agent_answers(self, node: NodePlan) -> None:
        """Wait until the node's agent is ready: without it no pod starts. One that never is, is the pods' to tell."""
        path = str(mesh.files_of(node).run_dir / "agent.sock")
        try:
            async with asyncio.timeout(_AGENT_S):
                while True:
                    try:
                        reader, writer = await asyncio.open_unix_connection(path)
                        writer.write(b"GET /ready HTTP/1.0\r\n\r\n")
                        answer = await reader.read(64)
                        writer.close()
                        if b" 200 " in answer:
                            return
                    except OSError:
                        pass  # not there yet
                    await asyncio.sleep(0.05)
        except TimeoutError:
            log.warning("%s: no agent after %.0f s: no pod of it will start; see the node's log", node.name, _AGENT_S)

    async def _create_objects(self, client: KubeClient) -> None:
        """Nodes, and the DNS server's Service, which other addresses' owners expect to find."""
        for node in self._lab.plans():
            await client.create(NODE, _node(self._lab, node))
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kube-system"}}
        ports = [
            {"name": name, "protocol": protocol, "port": 53} for name, protocol in (("dns", "UDP"), ("dns-tcp", "TCP"))
        ]
        spec = {
            "clusterIP": self._lab.dns_addresses[0],
            "clusterIPs": list(self._lab.dns_addresses),
            "ipFamilyPolicy": "RequireDualStack" if self._lab.ipv6 else "SingleStack",
            "ports": ports,
        }
        service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "kube-dns"}, "spec": spec}
        for path, body in (("/api/v1/namespaces", namespace), ("/api/v1/namespaces/kube-system/services", service)):
            try:
                await client.request("POST", path, body=body)
            except ApiStatus as refusal:
                if refusal.code != 409:
                    raise


class _Stopped(Exception):
    """Ends the task group."""


def _node(lab: Lab, node: NodePlan) -> dict[str, object]:
    now = now_text()
    addresses = [{"type": "InternalIP", "address": address} for address in node.addresses]
    uname = os.uname()
    return {
        "metadata": {
            "name": node.name,
            "labels": {
                "kubernetes.io/hostname": node.name,
                "kubernetes.io/os": "linux",
                "topology.kubernetes.io/zone": f"zone{node.index}",
            },
        },
        "spec": {"podCIDR": node.pods4, "podCIDRs": list(node.pod_cidrs)},
        "status": {
            "addresses": [*addresses, {"type": "Hostname", "address": node.name}],
            "capacity": {"pods": "110", "cpu": str(os.cpu_count() or 1)},
            "allocatable": {"pods": "110", "cpu": str(os.cpu_count() or 1)},
            "conditions": [
                {
                    "type": "Ready",
                    "status": "True",
                    "reason": "KubeletReady",
                    "message": f"a node of lab {lab.name}",
                    "lastHeartbeatTime": now,
                    "lastTransitionTime": now,
                }
            ],
            "nodeInfo": {
                "kernelVersion": uname.release,
                "osImage": "network namespace",
                "operatingSystem": "linux",
                "architecture": uname.machine,
                "kubeletVersion": "v1.32.0-lab",
                "containerRuntimeVersion": "lab://1",
            },
        },
    }


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def main() -> int:
    parser = argparse.ArgumentParser(description="The process behind a lab; started by `ambient lab up`.")
    parser.add_argument("name")
    parser.add_argument("--progress", type=int, default=-1, help="file descriptor for progress lines")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    supervisor = Supervisor(record.read(arguments.name), arguments.progress)
    try:
        supervisor.build()
        # one thread per child, the default of 3.11, would be hundreds
        asyncio.set_child_watcher(asyncio.PidfdChildWatcher())
        asyncio.run(supervisor.run())
    except* (AmbientError, OSError, TimeoutError, subprocess.CalledProcessError) as faults:
        first = faults.exceptions[0]
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        log.exception("the lab cannot start")
        supervisor.say(error=str(first) or type(first).__name__)
        os._exit(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
