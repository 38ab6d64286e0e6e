"""Names, addresses and paths of a lab: everything follows from its name, the number of nodes and two switches.

Pure. Each lab is a network of its own, so two labs use the same addresses; what the kernel or the disk shares
(network namespaces, cgroups, the directory in /run) carries the lab's name. Everything that belongs to a lab can
therefore be found again by name alone, also when the process that made it is gone.

A shared name is ``PREFIX-LAB-SUFFIX`` and a suffix has no dash: labs ``a`` and ``a-b`` never claim each other's.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from ambient.errors import ConfigFault

RUN = PurePosixPath("/run/ambient-lab")
NODES_MAX = 16
UNDERLAY_BRIDGE = "br0"
POD_BRIDGE = "pods"
NODE_LINK = "eth0"
CLUSTER_DOMAIN = "cluster.local"
CONTROL_PORT = 15012

_NAME = re.compile(r"[a-z]([a-z0-9-]{0,18}[a-z0-9])?")
_NODE_NAME = re.compile(r"node[1-9][0-9]?")

UNDERLAY4 = ipaddress.IPv4Network("172.31.0.0/24")
UNDERLAY6 = ipaddress.IPv6Network("fd00:31::/64")
PODS4 = ipaddress.IPv4Network("10.244.0.0/16")
PODS6 = ipaddress.IPv6Network("fd00:244::/48")
SERVICES4 = ipaddress.IPv4Network("10.96.0.0/16")
SERVICES6 = ipaddress.IPv6Network("fd00:96::/112")
DNS4 = str(SERVICES4[10])
DNS6 = str(SERVICES6[10])


@dataclass(frozen=True, slots=True)
class NodePlan:
    """One node. Addresses are text without a prefix length; IPv6 ones are empty in an IPv4 lab."""

    name: str
    index: int
    netns: str
    address4: str
    address6: str
    pods4: str
    pods6: str
    gateway4: str
    gateway6: str
    cgroup: PurePosixPath
    """Relative to the cgroup2 mount."""
    directory: PurePosixPath

    @property
    def pods_cgroup(self) -> PurePosixPath:
        return self.cgroup / "kubepods"

    @property
    def kubelet_cgroup(self) -> PurePosixPath:
        return self.cgroup / "kubelet"

    @property
    def ztunnel_cgroup(self) -> PurePosixPath:
        return self.cgroup / "ztunnel"

    @property
    def agent_cgroup(self) -> PurePosixPath:
        return self.cgroup / "agent"

    @property
    def cgroups(self) -> tuple[PurePosixPath, ...]:
        """All cgroups of the node but those of pods, parents first."""
        return (self.cgroup, self.pods_cgroup, self.kubelet_cgroup, self.ztunnel_cgroup, self.agent_cgroup)

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(a for a in (self.address4, self.address6) if a)

    @property
    def pod_cidrs(self) -> tuple[str, ...]:
        return tuple(c for c in (self.pods4, self.pods6) if c)

    @property
    def underlay_port(self) -> str:
        """The node's end of the underlay as the underlay's bridge sees it: what to give tcpdump."""
        return self.name


@dataclass(frozen=True, slots=True)
class Lab:
    """A lab's plan. Raises ConfigFault for a name or size that cannot be."""

    name: str
    nodes: int = 2
    ipv6: bool = True

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigFault("lab name", self.name, "1 to 20 of a-z, 0-9 and -, beginning with a letter")
        if not 1 <= self.nodes <= NODES_MAX:
            raise ConfigFault("--nodes", self.nodes, f"1 to {NODES_MAX}")

    @property
    def directory(self) -> PurePosixPath:
        return RUN / self.name

    @property
    def cgroup(self) -> PurePosixPath:
        """Relative to the cgroup2 mount."""
        return PurePosixPath(f"ambient-lab-{self.name}")

    @property
    def underlay_netns(self) -> str:
        return f"al-{self.name}-underlay"

    @property
    def control4(self) -> str:
        """Where the control plane and the API server's second socket listen, in the underlay's namespace."""
        return str(UNDERLAY4[1])

    @property
    def control6(self) -> str:
        return str(UNDERLAY6[1]) if self.ipv6 else ""

    @property
    def kubeconfig(self) -> PurePosixPath:
        """For the user: the API server on the host's loopback."""
        return self.directory / "kubeconfig"

    @property
    def node_kubeconfig(self) -> PurePosixPath:
        """For processes in the lab's networks: the API server on the underlay."""
        return self.directory / "kubeconfig-underlay"

    @property
    def stopped(self) -> PurePosixPath:
        """Files here name processes of the mesh that shall not run: `control` or a node."""
        return self.directory / "stopped"

    @property
    def bpffs(self) -> PurePosixPath:
        return self.directory / "bpf"

    @property
    def dns_addresses(self) -> tuple[str, ...]:
        return (DNS4, DNS6) if self.ipv6 else (DNS4,)

    @property
    def cluster_ranges(self) -> tuple[str, ...]:
        """Pods and services of all nodes."""
        ranges = (str(PODS4), str(SERVICES4))
        return ranges + (str(PODS6), str(SERVICES6)) if self.ipv6 else ranges

    def node(self, index: int) -> NodePlan:
        """The plan of node ``index``, counted from 1."""
        name = f"node{index}"
        pods4 = ipaddress.IPv4Network((int(PODS4.network_address) + (index << 8), 24))
        pods6 = ipaddress.IPv6Network((int(PODS6.network_address) + (index << 64), 64))
        return NodePlan(
            name=name,
            index=index,
            netns=f"al-{self.name}-{name}",
            address4=str(UNDERLAY4[10 + index]),
            address6=str(UNDERLAY6[10 + index]) if self.ipv6 else "",
            pods4=str(pods4),
            pods6=str(pods6) if self.ipv6 else "",
            gateway4=str(pods4[1]),
            gateway6=str(pods6[1]) if self.ipv6 else "",
            cgroup=self.cgroup / name,
            directory=self.directory / "nodes" / name,
        )

    def plans(self) -> tuple[NodePlan, ...]:
        return tuple(self.node(index) for index in range(1, self.nodes + 1))

    def pod_netns(self, sandbox: str) -> str:
        return f"al-{self.name}-p{sandbox}"

    def owns_netns(self, name: str) -> bool:
        """Whether a network namespace of this name was made by this lab, whatever its size was."""
        head, _, suffix = name.rpartition("-")
        return head == f"al-{self.name}" and (
            suffix == "underlay" or bool(_NODE_NAME.fullmatch(suffix) or re.fullmatch(r"p[0-9a-f]{10}", suffix))
        )


def sandbox_id(uid: str, attempt: int) -> str:
    """Ten hex digits that name one sandbox of a pod: its namespace, its link and its CNI container ID."""
    return hashlib.sha256(f"{uid}/{attempt}".encode()).hexdigest()[:10]


def pod_link(sandbox: str) -> str:
    """The node's end of a pod's link; at most 15 characters, as the kernel demands."""
    return f"v{sandbox}"
