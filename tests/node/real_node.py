"""A node for tests: the real holder and agent on the real kernel, an API server, pods as namespaces.

ztunnel alone is a stand-in (holder_children), which takes the listeners and says who accepted. Everything is
named after this process and removed at the end, whatever failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from ambient.io import bpf_links, bpffs, cgroup
from ambient.io.bpf_maps import Maps
from ambient.io.kube import KubeClient
from ambient.io.kube_auth import from_kubeconfig
from ambient.lab.apiserver.http import ApiServer
from ambient.manifest.kinds import NAMESPACE, POD
from ambient.manifest.objects import Pod
from ambient.manifest.pods import uid_on_node
from ambient.settings import NodeSettings
from tests.support.control import ControlPlane, Now

CHILDREN = Path(__file__).with_name("holder_children.py")
NODE = "node-a"
STUB = Path("build/ambient-cni")


def build_stub() -> Path:
    source = Path("ambient/node/cni_stub.c")
    if not STUB.exists() or STUB.stat().st_mtime < source.stat().st_mtime:
        STUB.parent.mkdir(exist_ok=True)
        argv = ["gcc", "-O2", "-static", "-Wall", "-Wextra", "-Werror", "-o", f"{STUB}.{os.getpid()}", str(source)]
        subprocess.run(argv, check=True)
        os.replace(f"{STUB}.{os.getpid()}", STUB)
    return STUB.absolute()


class Sandbox:
    """A pod's namespace and its one process, which nobody may touch."""

    def __init__(self, name: str, address: str, directory: Path, outside: str) -> None:
        self.name, self.address, self.cgroup = name, address, directory
        self.path = f"/run/netns/{name}"
        self.process: subprocess.Popen[bytes] | None = None
        end = f"v{name.rpartition('-')[2]}"
        for argv in (
            f"ip netns add {name}",
            f"ip -n {name} link set lo up",
            f"ip -n {outside} link add {end} type veth peer name eth0 netns {name}",
            f"ip -n {outside} link set {end} master br0 up",
            f"ip -n {name} address add {address}/24 dev eth0",
            f"ip -n {name} -6 address add {self.addresses[1]}/64 dev eth0 nodad",
            f"ip -n {name} link set eth0 up",
            f"ip -n {name} route add default via 10.77.0.1",
        ):
            subprocess.run(argv.split(), check=True)

    @property
    def addresses(self) -> list[str]:
        return [self.address, f"fd00:77::{self.address.rpartition('.')[2]}"]

    def start(self) -> None:
        cgroup.create(self.cgroup)
        self.process = self.spawn("import signal; signal.pause()")

    def spawn(self, code: str, **more: Any) -> subprocess.Popen[bytes]:
        """A process of the pod."""
        enter = f'echo $$ > {self.cgroup}/cgroup.procs && exec nsenter --net={self.path} "$0" -c "$1"'
        return subprocess.Popen(["sh", "-c", enter, sys.executable, code], **more)

    def ask(self, code: str) -> str:
        """Standard output of a process of the pod."""
        out, _ = self.spawn(code, stdout=subprocess.PIPE).communicate(timeout=20)
        return out.decode().strip()

    def dial(self, address: str, port: int) -> str:
        """What a connection of the pod receives, or the error."""
        return self.ask(
            "import socket\n"
            f"try:\n s = socket.create_connection(({address!r}, {port}), timeout=8); print(s.recv(32).decode())\n"
            "except OSError as e: print(type(e).__name__)\n"
        )

    def remove(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        subprocess.run(["ip", "netns", "del", self.name], stderr=subprocess.DEVNULL)


class RealNode:
    def __init__(self, directory: Path, api: ApiServer, client: KubeClient, control: ControlPlane) -> None:
        self.directory, self.api, self.client, self.control = directory, api, client, control
        self.run_dir = directory / "run"
        self.tag = f"amb-node-{os.getpid()}"
        self.cgroup = cgroup.mount_point() / self.tag
        self.bpffs = Path("/sys/fs/bpf") / self.tag
        self.holder: subprocess.Popen[bytes] | None = None
        self.sandboxes: list[Sandbox] = []
        self.config = directory / "node.yaml"
        self._containers = 0

    def prepare(self, port: int) -> None:
        for name in ("kubepods", "kubelet", "agent", "ztunnel"):
            cgroup.create(self.cgroup / name)
        net = f"{self.tag}-net"
        for argv in (
            f"ip netns add {net}",
            f"ip -n {net} link set lo up",
            f"ip -n {net} link add br0 type bridge",
            f"ip -n {net} link set br0 up",
            f"ip -n {net} address add 10.77.0.1/24 dev br0",
            f"ip -n {net} -6 address add fd00:77::1/64 dev br0 nodad",
        ):
            subprocess.run(argv.split(), check=True)
        (self.directory / "kubeconfig").write_text(self.api.kubeconfig(f"https://127.0.0.1:{port}"))
        self.settings = self.control.node(
            NODE,
            run_dir=str(self.run_dir),
            bpffs_dir=str(self.bpffs),
            node_cgroup=str(self.cgroup),
            pods_cgroup=str(self.cgroup / "kubepods"),
            kubelet_cgroups=(str(self.cgroup / "kubelet"),),
            agent_cgroup=str(self.cgroup / "agent"),
            ztunnel_cgroup=str(self.cgroup / "ztunnel"),
            cluster_ranges=("10.77.0.0/16", "fd00:77::/64"),
            kubeconfig=str(self.directory / "kubeconfig"),
            drain_s=1.0,
        )
        assert isinstance(self.settings, NodeSettings)
        self.config.write_bytes(msgspec.json.encode(self.settings))  # JSON is YAML

    # --- processes

    def start(self) -> None:
        argv = [sys.executable, str(CHILDREN), "holder", str(self.config), "real"]
        self.holder = subprocess.Popen(argv, env=os.environ | {"PYTHONPATH": os.getcwd()})

    def pid(self, role: str) -> int:
        return int((self.run_dir / f"{role}.pid").read_text())

    async def kill(self, role: str) -> int:
        """kill -9; returns when another one runs."""
        old = self.pid(role)
        os.kill(old, signal.SIGKILL)
        await self.until(lambda: self._other(role, old), f"a new {role}")
        return old

    def _other(self, role: str, old: int) -> bool:
        try:
            return self.pid(role) != old
        except (OSError, ValueError):
            return False

    async def until(self, condition: Any, what: str = "", within_s: float = 20.0) -> Any:
        """Wait until the (perhaps awaitable) condition holds; its value."""
        try:
            async with asyncio.timeout(within_s):
                while True:
                    value = condition()
                    if asyncio.iscoroutine(value):
                        value = await value
                    if value:
                        return value
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"not within {within_s} s: {what}: {await self.status()}") from None

    async def status(self) -> dict[str, Any]:
        try:
            connector = aiohttp.UnixConnector(str(self.run_dir / "agent.sock"))
            async with aiohttp.ClientSession(connector=connector) as session, session.get("http://agent/status") as r:
                return dict(await r.json())
        except (aiohttp.ClientError, OSError) as error:
            return {"ready": False, "pods": [], "error": str(error)}

    async def ready(self) -> None:
        async def look() -> bool:
            return bool((await self.status())["ready"])

        await self.until(look, "the agent is ready", 60)

    async def state(self, name: str) -> dict[str, Any]:
        pods = (await self.status())["pods"]
        return next((p for p in pods if p["name"] == name), {"state": "", "reason": ""})

    async def reaches(self, name: str, state: str, within_s: float = 20.0) -> dict[str, Any]:
        async def look() -> dict[str, Any] | None:
            found = await self.state(name)
            return found if found["state"] == state else None

        return dict(await self.until(look, f"{name} is {state}", within_s))

    # --- objects

    async def namespace(self, name: str, mode: str | None = None) -> None:
        labels = {"istio.io/dataplane-mode": mode} if mode else {}
        await self.client.create(NAMESPACE, {"metadata": {"name": name, "labels": labels}})

    async def label(self, namespace: str, mode: str | None) -> None:
        await self.client.patch(NAMESPACE, namespace, {"metadata": {"labels": {"istio.io/dataplane-mode": mode}}})

    async def pod(self, name: str, namespace: str, **more: Any) -> Pod:
        """The API object; it is scheduled here and has no address yet."""
        spec = {
            "nodeName": NODE,
            "serviceAccountName": "default",
            "containers": [{"name": "c", "image": "i"}],
        } | more.pop("spec", {})
        return await self.client.create(POD, {"metadata": {"name": name} | more, "spec": spec}, namespace)

    async def get(self, name: str, namespace: str) -> Pod:
        return await self.client.get(POD, name, namespace)

    async def running(self, pod: Pod, addresses: list[str]) -> None:
        status = {
            "phase": "Running",
            "podIP": addresses[0],
            "podIPs": [{"ip": a} for a in addresses],
            "conditions": [{"type": "Ready", "status": "True"}],
        }
        await self.client.patch(POD, pod.name, {"status": status}, pod.namespace, subresource="status")

    # --- sandboxes and CNI

    def sandbox(self, pod: Pod, address: str) -> Sandbox:
        name = f"{self.tag}-{len(self.sandboxes)}"
        made = Sandbox(name, address, self.cgroup / "kubepods" / f"pod{uid_on_node(pod)}", f"{self.tag}-net")
        self.sandboxes.append(made)
        return made

    async def cni(self, command: str, pod: Pod, sandbox: Sandbox, container: str = "", **env: str) -> tuple[int, Any]:
        """Run the built stub as a container runtime does. Exit code and result."""
        config = {
            "cniVersion": "1.0.0",
            "name": "k8s",
            "type": "ambient-cni",
            "runDir": str(self.run_dir),
            "prevResult": {"cniVersion": "1.0.0", "ips": [{"address": f"{a}/24"} for a in sandbox.addresses]},
        }
        arguments = f"K8S_POD_NAMESPACE={pod.namespace};K8S_POD_NAME={pod.name};K8S_POD_UID={uid_on_node(pod)}"
        process = await asyncio.create_subprocess_exec(
            str(build_stub()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={
                "CNI_COMMAND": command,
                "CNI_CONTAINERID": container or f"c-{pod.metadata.uid}",
                "CNI_NETNS": sandbox.path,
                "CNI_IFNAME": "eth0",
                "CNI_ARGS": arguments,
                "CNI_PATH": "/opt/cni/bin",
            }
            | env,
        )
        out, _ = await process.communicate(json.dumps(config).encode())
        return process.returncode or 0, json.loads(out) if out.strip() else None

    def dial_from_outside(self, address: str, port: int) -> str:
        """A connection of somebody outside the mesh: what it receives, or the error."""
        code = (
            "import socket\n"
            f"try:\n s = socket.create_connection(({address!r}, {port}), timeout=8); print(s.recv(32).decode())\n"
            "except OSError as e: print(type(e).__name__)\n"
        )
        argv = ["nsenter", f"--net=/run/netns/{self.tag}-net", sys.executable, "-c", code]
        return subprocess.run(argv, capture_output=True, timeout=20).stdout.decode().strip()

    def maps(self) -> Maps:
        return Maps.open(self.bpffs)

    def traces(self, addresses: list[str], uid: str = "", cookie: int = 0) -> list[str]:
        """Every entry and attachment that still names these."""
        found: list[str] = []
        with self.maps() as maps:
            found += [f"workloads {a}" for a in addresses if a in maps.workloads]
            found += [f"listeners {k}" for k, _ in maps.listeners.items() if k.pod in addresses]
            found += [f"authorized {k}" for k in maps.authorized if k.local in addresses]
            found += [f"origins {k}" for k in maps.origins if k.local in addresses]
            found += [f"enrolled {k}" for k, v in maps.enrolled.items() if k == cookie or v.address4 in addresses]
        if uid in bpf_links.attached_pods(self.bpffs):
            found.append(f"sk_lookup {uid}")
        return found

    # --- end

    def stop(self) -> None:
        if self.holder is not None and self.holder.poll() is None:
            self.holder.terminate()
            try:
                self.holder.wait(15)
            except subprocess.TimeoutExpired:
                self.holder.kill()
                self.holder.wait()

    def remove(self) -> None:
        self.stop()
        for sandbox in self.sandboxes:
            sandbox.remove()
        subprocess.run(["ip", "netns", "del", f"{self.tag}-net"], stderr=subprocess.DEVNULL)
        with contextlib.suppress(Exception):
            bpf_links.unload(self.bpffs)
            bpffs.remove_tree(self.bpffs)
        cgroup.kill(self.cgroup)
        for _ in range(200):
            if cgroup.remove(self.cgroup):
                break
            subprocess.run(["true"])


@contextlib.asynccontextmanager
async def real_node() -> AsyncIterator[RealNode]:
    """Loaded, started and ready."""
    directory = Path(tempfile.mkdtemp(prefix="ambient-real-node-"))
    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    api = ApiServer([sock])
    await api.start()
    (directory / "admin").write_text(api.kubeconfig(f"https://127.0.0.1:{port}"))
    client = KubeClient(from_kubeconfig(str(directory / "admin")))
    control = ControlPlane(directory, Now(time.time()))
    node = RealNode(directory, api, client, control)
    try:
        async with control:
            node.prepare(port)
            node.start()
            await node.ready()
            yield node
    finally:
        await asyncio.to_thread(node.remove)
        await client.close()
        await api.stop()
        shutil.rmtree(directory, ignore_errors=True)


_last = 10


def address() -> str:
    global _last
    _last += 1
    return f"10.77.0.{_last}"


async def added(node: RealNode, name: str, namespace: str = "shop", **more: Any) -> tuple[Pod, Sandbox]:
    """A pod made as the kubelet makes one: ADD, then its process, then its status."""
    pod = await node.pod(name, namespace, **more)
    sandbox = node.sandbox(pod, address())
    code, result = await node.cni("ADD", pod, sandbox)
    assert code == 0, result
    sandbox.start()
    await node.running(pod, sandbox.addresses)
    return pod, sandbox


async def gone(node: RealNode, pod: Any, sandbox: Sandbox) -> None:
    code, _ = await node.cni("DEL", pod, sandbox)
    assert code == 0
    await node.client.delete(POD, pod.name, pod.namespace)
