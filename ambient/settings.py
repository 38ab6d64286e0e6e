"""Settings of the long-running processes: frozen groups, one YAML file each, checked on reading.

Nothing here reads the environment or the disk: callers hand in text. A wrong value is a ConfigFault that
names the file, the field and the rule; an unknown field is an error, because a misspelt one is a hole.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TypeVar

import msgspec
import yaml

from ambient.errors import ConfigFault
from ambient.model.identity import Identity

LIFETIME_MIN_S = 5
LIFETIME_MAX_S = 3650 * 86400
ACKNOWLEDGE_MAX_S = 60

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


class NodeSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the holder, the agent and ztunnel of one node are told (`ambient node --config FILE`)."""

    node_name: str
    """metadata.name of this Node."""
    run_dir: str = "/run/ambient"
    """Directory of the sockets and state of this node; created 0700."""
    bpffs_dir: str = "/sys/fs/bpf/ambient"
    """Directory in a bpf file system for the pins of this node; one per node, also on a shared kernel."""
    node_cgroup: str = ""
    """cgroup2 directory at the node's root (sock_ops and the probe hook attach there). Empty: the mount's root."""
    pods_cgroup: str = ""
    """Lowest cgroup2 directory common to all pods. Empty: found below node_cgroup."""
    kubelet_cgroups: tuple[str, ...] = ()
    """cgroup2 directories of the kubelet: connections of their processes to pods are probes."""
    ztunnel_cgroup: str = ""
    """cgroup2 directory to start ztunnel in; exempt from capture. Empty: the holder's own cgroup."""
    agent_cgroup: str = ""
    """cgroup2 directory to start the agent in; exempt from capture. Empty: the holder's own cgroup."""
    cluster_ranges: tuple[str, ...] = ()
    """CIDRs of pods and services: an unknown address inside goes to ztunnel."""
    kubeconfig: str = ""
    """Path of a kubeconfig; empty: the in-cluster service account."""
    control_address: str = "ambient-control.ambient-system.svc:15012"
    """HOST:PORT of the control plane (xDS and CA)."""
    control_server_name: str = "ambient-control.ambient-system.svc"
    """DNS name the control plane's certificate must carry."""
    ca_root_file: str = "/var/run/secrets/ambient/root-cert.pem"
    """PEM bundle that authenticates the control plane; read again when it changes."""
    token_file: str = "/var/run/secrets/tokens/istio-token"
    """Projected service account token, audience istio-ca; read again at each connection."""
    trust_domain: str = "cluster.local"
    cluster_id: str = "Kubernetes"
    dns_upstreams: tuple[str, ...] = ()
    """ADDRESS or ADDRESS:PORT of the resolvers DNS is forwarded to; empty: /etc/resolv.conf of the node."""
    cluster_domain: str = "cluster.local"
    """DNS suffix of services."""
    ztunnel_workers: int = 0
    """Worker processes; 0: max(1, cores / 4), at most 8."""
    admin_port: int = 15000
    metrics_port: int = 15020
    readiness_port: int = 15021
    drain_s: float = 5.0
    """How long ztunnel lets connections finish after SIGTERM."""
    log_format: str = "text"
    """text or json."""
    log_level: str = "info"
    strict_means_off: bool = False
    """A STRICT workload never takes the kernel's path within the node: STRICT means encrypted."""
    heartbeat_timeout_s: int = 15
    """Pods of a namespace that is open on failure are captured no more when the agent was silent for so long. A
    restarted agent is back in two seconds. 0: never."""
    secret_ttl_s: int = 86400
    """Lifetime asked for workload certificates."""

    def __post_init__(self) -> None:
        _common(self)
        if not LIFETIME_MIN_S <= self.secret_ttl_s <= LIFETIME_MAX_S:
            raise ValueError(f"secret_ttl_s: {self.secret_ttl_s}: {LIFETIME_MIN_S} to {LIFETIME_MAX_S}")
        for text in self.cluster_ranges:
            try:
                ipaddress.ip_network(text)
            except ValueError as error:
                raise ValueError(f"cluster_ranges: {error}") from None
        if self.heartbeat_timeout_s != 0 and not 3 <= self.heartbeat_timeout_s <= 86400:
            raise ValueError(f"heartbeat_timeout_s: {self.heartbeat_timeout_s}: 0, or 3 to 86400")
        if not 0 <= self.ztunnel_workers <= 8:
            raise ValueError(f"ztunnel_workers: {self.ztunnel_workers}: 0 to 8")


class ControlSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the control plane is told (`ambient control --config FILE`)."""

    kubeconfig: str = ""
    listen: tuple[str, ...] = ("0.0.0.0:15012",)
    """ADDRESS:PORT of the gRPC server."""
    data_dir: str = "/var/lib/ambient"
    """Where the root key is kept (0600)."""
    root_cert_file: str = ""
    """A signing chain of your own (PEM), with root_key_file and root_bundle_file; all empty: the root is made here."""
    root_key_file: str = ""
    root_bundle_file: str = ""
    trust_domain: str = "cluster.local"
    cluster_id: str = "Kubernetes"
    cluster_domain: str = "cluster.local"
    root_namespace: str = "istio-system"
    """Namespace whose policies are mesh-wide (Istio's default, so that manifests carry over)."""
    system_namespace: str = "ambient-system"
    """Namespace of our own components; never enrolled."""
    node_accounts: tuple[str, ...] = ("ambient-system/ambient-node",)
    """namespace/serviceaccount allowed to ask for identities of pods on their node."""
    server_names: tuple[str, ...] = ("ambient-control.ambient-system.svc", "istiod.istio-system.svc", "localhost")
    """DNS names and IP addresses in the server certificate."""
    acknowledge_timeout_s: float = 5.0
    secret_ttl_max_s: int = 86400
    leader_election: bool = False
    admin_listen: str = "127.0.0.1:15014"
    """ADDRESS:PORT of readiness, metrics and debug."""
    log_format: str = "text"
    log_level: str = "info"

    def __post_init__(self) -> None:
        _common(self)
        for name in ("root_namespace", "system_namespace"):
            if not _LABEL.fullmatch(getattr(self, name)):
                raise ValueError(f"{name}: {getattr(self, name)[:80]!r}: the name of a namespace")
        for account in self.node_accounts:
            if [bool(_NAME.fullmatch(part)) for part in account.split("/")] != [True, True]:
                raise ValueError(f"node_accounts: {account[:80]!r}: namespace/serviceaccount")
        for name in ("listen", "server_names"):
            if not getattr(self, name):
                raise ValueError(f"{name}: must not be empty")
        for text in self.server_names:
            if not text or not text.isascii():
                raise ValueError(f"server_names: {text[:80]!r}: a DNS name in ASCII, or an IP address")
        if not 0 <= self.acknowledge_timeout_s <= ACKNOWLEDGE_MAX_S:  # also what is not a number
            raise ValueError(f"acknowledge_timeout_s: {self.acknowledge_timeout_s}: 0 to {ACKNOWLEDGE_MAX_S}")
        if not LIFETIME_MIN_S <= self.secret_ttl_max_s <= LIFETIME_MAX_S:
            raise ValueError(f"secret_ttl_max_s: {self.secret_ttl_max_s}: {LIFETIME_MIN_S} to {LIFETIME_MAX_S}")


def _common(settings: NodeSettings | ControlSettings) -> None:
    """What both must be right about. Raises ValueError naming the field."""
    try:
        Identity(settings.trust_domain, "n", "a")  # else no pod has an identity, and the mesh would be empty
    except ValueError as error:
        raise ValueError(f"trust_domain: {error}") from None
    if not _NAME.fullmatch(settings.cluster_domain):
        raise ValueError(f"cluster_domain: {settings.cluster_domain[:80]!r}: a DNS name in lower case")
    if not settings.cluster_id:
        raise ValueError("cluster_id: must not be empty")
    if settings.log_format not in ("text", "json"):
        raise ValueError(f"log_format: {settings.log_format!r}: text or json")


_Settings = TypeVar("_Settings", NodeSettings, ControlSettings)


def read_settings(kind: type[_Settings], text: str, where: str) -> _Settings:
    """Parse YAML text. Raises ConfigFault naming ``where`` (the file), the field and the rule."""
    try:
        return msgspec.convert(yaml.safe_load(text) or {}, kind)
    except (ValueError, yaml.YAMLError, RecursionError, OverflowError) as error:  # ValidationError is a ValueError
        raise ConfigFault(where, "YAML", " ".join(str(error).split())) from None  # the text may be somebody's secret
