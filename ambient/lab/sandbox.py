"""A pod's sandbox: network namespace, cgroup, CNI, and a process that keeps the mount and UTS namespaces.

`make` does everything or raises; `remove` takes back whatever there is, in the reverse order, and may be called
at any time and again. The sandbox's process is what a pause container is elsewhere: it belongs to the pod's cgroup
and namespace for the pod's whole life, so the pod can be found in /proc also between restarts of its containers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from ambient.errors import PlatformFault
from ambient.lab import cgroups, commands
from ambient.lab.cni import Added, Chain, CniFault, Sandbox
from ambient.lab.objects import KubeletPod
from ambient.lab.topology import CLUSTER_DOMAIN, DNS4, Lab, NodePlan, sandbox_id

log = logging.getLogger(__name__)

WISHED_ADDRESS = "ambient.lab/ip"
"""Annotation of a pod: the IPv4 address to ask the primary CNI for."""
_START_S = 10.0

# $1: the pod's directory, $2: its host name. Mounts are slaves, so that a lab's end elsewhere is not held up here.
_KEEPER = """set -e
echo "$2" > /proc/sys/kernel/hostname
for name in resolv.conf hosts hostname; do
  [ ! -e "/etc/$name" ] || mount --bind "$1/$name" "/etc/$name"
done
while read -r _ where kind _; do
  case "$kind" in bpf) umount -l "$where" ;; esac
done < /proc/self/mounts
umount -R -l /run/netns 2>/dev/null || :
echo ready
exec sleep infinity
"""


@dataclass(slots=True)
class _Made:
    sandbox: Sandbox
    added: Added | None = None
    keeper: asyncio.subprocess.Process | None = None
    cni_asked: bool = False


class PodSandbox:
    """One pod's sandbox. After `make`: ``netns`` (path), ``keeper_pid``, ``addresses``."""

    def __init__(self, lab: Lab, node: NodePlan, chain: Chain, pod: KubeletPod) -> None:
        self._lab = lab
        self._node = node
        self._chain = chain
        self._pod = pod
        self._attempt = 0
        self._made: _Made | None = None
        self.directory = Path(node.directory) / "pods" / pod.metadata.uid
        self.cgroup = cgroups.mount_point() / node.pods_cgroup / f"pod{pod.metadata.uid}"
        self.netns = ""
        self.keeper_pid = 0
        self.addresses: tuple[str, ...] = ()

    async def make(self) -> None:
        """Raises CniFault or PlatformFault; what was made stays until `remove`."""
        pod = self._pod
        name = sandbox_id(pod.metadata.uid, self._attempt)
        self._attempt += 1
        self.directory.mkdir(parents=True, exist_ok=True)
        cgroups.create(self._node.pods_cgroup / self.cgroup.name)
        if pod.spec.host_network:
            self.netns = commands.netns_path(self._node.netns)
            self.addresses = self._node.addresses
            self._made = _Made(Sandbox(name, "", pod.name, pod.namespace, pod.metadata.uid))
        else:
            netns = self._lab.pod_netns(name)
            self.netns = commands.netns_path(netns)
            sandbox = Sandbox(
                name, self.netns, pod.name, pod.namespace, pod.metadata.uid, pod.annotations.get(WISHED_ADDRESS, "")
            )
            self._made = _Made(sandbox)
            answer = await commands.run_async(["ip", "netns", "add", netns])
            if answer.code:
                raise PlatformFault(f"ip netns add {netns}: {answer.talk()}")
            self._made.cni_asked = True
            self._made.added = await self._chain.add(sandbox)
            self.addresses = self._made.added.addresses
        await self._keep()

    async def _keep(self) -> None:
        """Start the process that holds the namespaces; it is ready when it has said so."""
        assert self._made is not None
        pod = self._pod
        hostname = pod.spec.hostname or pod.name[:63]
        for file, text in etc_files(pod, hostname, self.addresses, self._lab.ipv6).items():
            (self.directory / file).write_text(text)
        argv = commands.enter_argv(
            ["unshare", "--mount", "--uts", "--propagation", "slave", "--",
             "sh", "-c", _KEEPER, "keeper", str(self.directory), hostname],
            cgroup=str(self.cgroup),
            netns=self.netns,
        )  # fmt: skip
        keeper = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            env={"PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")},
        )
        self._made.keeper = keeper
        assert keeper.stdout is not None and keeper.stderr is not None
        try:
            async with asyncio.timeout(_START_S):
                line = await keeper.stdout.readline()
        except TimeoutError:
            line = b""
        if line != b"ready\n":
            with contextlib.suppress(ProcessLookupError):
                keeper.kill()
            talk = (await keeper.stderr.read()).decode(errors="replace")
            raise PlatformFault(f"namespaces of pod {pod.key}: {talk.strip()[:500] or 'no answer'}")
        self.keeper_pid = keeper.pid
        self._write_state()

    def _write_state(self) -> None:
        """For `lab exec` and for whoever looks: where this pod is."""
        state = {
            "uid": self._pod.metadata.uid,
            "name": self._pod.name,
            "namespace": self._pod.namespace,
            "node": self._node.name,
            "netns": self.netns,
            "cgroup": str(self.cgroup),
            "pid": self.keeper_pid,
            "addresses": list(self.addresses),
        }
        (self.directory / "pod.json").write_text(json.dumps(state))

    async def remove(self) -> None:
        """End all processes, ask the plugins for DEL, remove the namespace and the cgroup. Faults are logged.

        Raises CniFault if a plugin could not do its DEL; the pod must not be forgotten then, so call again.
        """
        loop = asyncio.get_running_loop()
        made, self.keeper_pid = self._made, 0
        if self.cgroup.is_dir():
            await loop.run_in_executor(None, cgroups.kill, self.cgroup)
        if made is not None and made.keeper is not None:
            await made.keeper.wait()
        if made is not None and made.cni_asked:
            await self._chain.delete(made.sandbox, made.added)
            made.cni_asked = False
        if made is not None and made.sandbox.netns:
            await commands.run_async(["ip", "netns", "del", os.path.basename(made.sandbox.netns)])
        await loop.run_in_executor(None, cgroups.remove, self.cgroup)
        (self.directory / "pod.json").unlink(missing_ok=True)
        self._made, self.addresses, self.netns = None, (), ""

    async def forget(self) -> None:
        """The pod is gone from the API: its files and logs go, too."""
        await asyncio.get_running_loop().run_in_executor(None, shutil.rmtree, self.directory, True)


def etc_files(pod: KubeletPod, hostname: str, addresses: tuple[str, ...], ipv6: bool) -> dict[str, str]:
    """resolv.conf, hosts and hostname of a pod."""
    search = f"{pod.namespace}.svc.{CLUSTER_DOMAIN} svc.{CLUSTER_DOMAIN} {CLUSTER_DOMAIN}"
    names = hostname
    if pod.spec.subdomain:
        names = f"{hostname}.{pod.spec.subdomain}.{pod.namespace}.svc.{CLUSTER_DOMAIN}\t{hostname}"
    hosts = ["127.0.0.1\tlocalhost", *(["::1\tlocalhost ip6-localhost ip6-loopback"] if ipv6 else [])]
    hosts += [f"{address}\t{names}" for address in addresses]
    return {
        "resolv.conf": f"search {search}\nnameserver {DNS4}\noptions ndots:5\n",
        "hosts": "\n".join(hosts) + "\n",
        "hostname": hostname + "\n",
    }


__all__ = ["CniFault", "PodSandbox", "etc_files"]
