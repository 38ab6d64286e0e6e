"""The mesh in a lab: the real control plane and the real node processes, told where they are by settings only.

What a cluster's manifests would do is done here: namespace, service account, a pod object for each node's agent,
its bound token kept fresh, the settings files, the CNI configuration, and the processes themselves.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import shutil
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import yaml

import ambient
from ambient.errors import AmbientError, PlatformFault
from ambient.io.kube import KubeClient
from ambient.io.kube_answers import ApiStatus
from ambient.lab import cgroups
from ambient.lab.container import now_text
from ambient.lab.objects import MIRROR, POD
from ambient.lab.process import KeptProcess, python_module
from ambient.lab.topology import CLUSTER_DOMAIN, CONTROL_PORT, DNS4, POD_BRIDGE, Lab, NodePlan
from ambient.manifest.kinds import SERVICE_ACCOUNT
from ambient.settings import ControlSettings, NodeSettings

log = logging.getLogger(__name__)

CONTROL = "control"
SYSTEM = "ambient-system"
ACCOUNT = "ambient-node"
AUDIENCE = "istio-ca"
CNI_STUB = "ambient-cni"
CNI_BRIDGE = "lab-bridge"
TOKEN_S = 3600
_RETRY_S = 0.5


@dataclass(frozen=True, slots=True)
class NodeFiles:
    """Where one node's files are."""

    directory: Path

    @property
    def settings(self) -> Path:
        return self.directory / "node.yaml"

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    @property
    def token(self) -> Path:
        return self.directory / "token"

    @property
    def cni_config(self) -> Path:
        return self.directory / "cni" / "net.d" / "10-lab.conflist"

    @property
    def cni_bin(self) -> Path:
        return self.directory / "cni" / "bin"


def files_of(node: NodePlan) -> NodeFiles:
    return NodeFiles(Path(node.directory))


def control_settings(lab: Lab) -> ControlSettings:
    addresses = [lab.control4, f"[{lab.control6}]"] if lab.ipv6 else [lab.control4]
    return ControlSettings(
        kubeconfig=str(lab.node_kubeconfig),
        listen=tuple(f"{address}:{CONTROL_PORT}" for address in addresses),
        data_dir=str(lab.directory / "control"),
        cluster_domain=CLUSTER_DOMAIN,
        system_namespace=SYSTEM,
        node_accounts=(f"{SYSTEM}/{ACCOUNT}",),
    )


def node_settings(lab: Lab, node: NodePlan, mount: Path) -> NodeSettings:
    """``mount`` is where cgroup2 is mounted."""
    files = files_of(node)
    return NodeSettings(
        node_name=node.name,
        run_dir=str(files.run_dir),
        bpffs_dir=str(lab.bpffs / node.name),
        node_cgroup=str(mount / node.cgroup),
        pods_cgroup=str(mount / node.pods_cgroup),
        kubelet_cgroups=(str(mount / node.kubelet_cgroup),),
        ztunnel_cgroup=str(mount / node.ztunnel_cgroup),
        agent_cgroup=str(mount / node.agent_cgroup),
        cluster_ranges=lab.cluster_ranges,
        kubeconfig=str(lab.node_kubeconfig),
        control_address=f"{lab.control4}:{CONTROL_PORT}",
        ca_root_file=str(lab.directory / "control" / "root-bundle.pem"),
        token_file=str(files.token),
        dns_upstreams=(DNS4,),
        cluster_domain=CLUSTER_DOMAIN,
    )


def write_settings(path: Path, settings: NodeSettings | ControlSettings) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(msgspec.to_builtins(settings), sort_keys=False))


def cni_configuration(node: NodePlan, mesh: bool) -> dict[str, Any]:
    """The plugin list of a node: the bridge, and behind it the mesh's plugin."""
    bridge = {
        "type": CNI_BRIDGE,
        "bridge": POD_BRIDGE,
        "subnets": list(node.pod_cidrs),
        "gateways": [gateway for gateway in (node.gateway4, node.gateway6) if gateway],
        "dataDir": str(Path(node.directory) / "cni" / "addresses"),
    }
    chained = [{"type": CNI_STUB, "runDir": str(files_of(node).run_dir)}] if mesh else []
    return {"cniVersion": "1.0.0", "name": "lab", "plugins": [bridge, *chained]}


def install_cni(node: NodePlan, mesh: bool) -> None:
    """Write the configuration and put the binaries in place. PlatformFault if the stub was never built."""
    files = files_of(node)
    files.cni_bin.mkdir(parents=True, exist_ok=True)
    files.cni_config.parent.mkdir(parents=True, exist_ok=True)
    plugin = Path(__file__).with_name("cni_bridge.py")
    script = files.cni_bin / CNI_BRIDGE
    script.write_text(f"#!/bin/sh\nexec {sys.executable} -I -S {plugin}\n")
    script.chmod(0o755)
    if mesh:
        shutil.copy2(built_stub(), files.cni_bin / CNI_STUB)
    files.cni_config.write_text(json.dumps(cni_configuration(node, mesh), indent=2))


def built_stub() -> Path:
    """build/ambient-cni beside the package. PlatformFault if it is not there."""
    path = Path(ambient.__file__).resolve().parent.parent / "build" / CNI_STUB
    if not os.access(path, os.X_OK):
        raise PlatformFault(f"{path} is missing: make build/{CNI_STUB}")
    return path


class NodeAccount:
    """The identity of one node's agent: its pod object, and the bound token in a file, kept fresh by `run`."""

    def __init__(self, node: NodePlan, client: KubeClient) -> None:
        self._node = node
        self._client = client
        self.pod_name = f"{ACCOUNT}-{node.name}"

    async def create(self) -> None:
        """The pod object (a mirror: no kubelet starts it) and the first token."""
        node = self._node
        body = {
            "metadata": {
                "name": self.pod_name,
                "labels": {"app": ACCOUNT},
                "annotations": {MIRROR: node.name},
            },
            "spec": {
                "nodeName": node.name,
                "hostNetwork": True,
                "serviceAccountName": ACCOUNT,
                "containers": [{"name": "agent", "image": "ambient-node"}],
            },
        }
        pod = await self._client.create(POD, body, SYSTEM)
        now = now_text()
        status = {
            "phase": "Running",
            "hostIP": node.address4,
            "podIP": node.address4,
            "podIPs": [{"ip": address} for address in node.addresses],
            "startTime": now,
            "conditions": [
                {"type": name, "status": "True", "lastTransitionTime": now}
                for name in ("PodScheduled", "Initialized", "ContainersReady", "Ready")
            ],
            "containerStatuses": [
                {
                    "name": "agent",
                    "image": "ambient-node",
                    "imageID": "",
                    "ready": True,
                    "started": True,
                    "restartCount": 0,
                    "state": {"running": {"startedAt": now}},
                }
            ],
        }
        await self._client.patch(POD, self.pod_name, {"status": status}, SYSTEM, subresource="status")
        self._uid = pod.metadata.uid
        await self._renew()

    async def _renew(self) -> float:
        """Write a new token; returns in how many seconds to do it again."""
        reference = {"kind": "Pod", "apiVersion": "v1", "name": self.pod_name, "uid": self._uid}
        spec = {"audiences": [AUDIENCE], "expirationSeconds": TOKEN_S, "boundObjectRef": reference}
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        path = SERVICE_ACCOUNT.path(SYSTEM, ACCOUNT, "token")
        status = json.loads(await self._client.request("POST", path, body=request))["status"]
        file = files_of(self._node).token
        aside = file.with_suffix(".new")
        aside.touch(mode=0o600)
        aside.write_text(status["token"])
        os.replace(aside, file)
        expires = datetime.fromisoformat(status["expirationTimestamp"].replace("Z", "+00:00"))
        return (expires - datetime.now(UTC)).total_seconds() * random.uniform(0.45, 0.55)

    async def run(self) -> None:
        """Renew at half life, until cancelled."""
        pause_s = TOKEN_S / 2
        while True:
            await asyncio.sleep(pause_s)
            try:
                pause_s = max(1.0, await self._renew())
            except (AmbientError, OSError, ValueError, KeyError) as error:
                log.warning("token of %s: %s", self.pod_name, error)
                pause_s = _RETRY_S


async def create_system(client: KubeClient) -> None:
    """The mesh's namespace and the account of its nodes."""
    for path, body in (
        ("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM}}),
        (
            SERVICE_ACCOUNT.path(SYSTEM),
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": ACCOUNT, "namespace": SYSTEM}},
        ),
    ):
        try:
            await client.request("POST", path, body=body)
        except ApiStatus as refusal:
            if refusal.code != 409:
                raise


def control_process(lab: Lab, logs: Path) -> KeptProcess:
    """Writes the settings; the process is the caller's to run."""
    settings = Path(lab.directory) / "control.yaml"
    write_settings(settings, control_settings(lab))
    (Path(lab.directory) / "control").mkdir(mode=0o700, exist_ok=True)
    cgroup = cgroups.create(lab.cgroup / "control")
    argv = python_module("ambient.io.run_control", "--config", str(settings))
    return KeptProcess(
        CONTROL,
        argv,
        cgroup=cgroup,
        netns=lab.underlay_netns,
        log_file=logs / "control.log",
        stopped=Path(lab.stopped),
    )


def holder_process(lab: Lab, node: NodePlan, logs: Path) -> KeptProcess:
    """Writes the settings; the process is the caller's to run. It starts in the agent's cgroup."""
    files = files_of(node)
    mount = cgroups.mount_point()
    write_settings(files.settings, node_settings(lab, node, mount))
    Path(lab.bpffs / node.name).mkdir(parents=True, exist_ok=True)
    argv = python_module("ambient.node.holder", "--config", str(files.settings))
    return KeptProcess(
        node.name,
        argv,
        cgroup=mount / node.agent_cgroup,
        netns=node.netns,
        log_file=logs / f"{node.name}.log",
        stopped=Path(lab.stopped),
    )
