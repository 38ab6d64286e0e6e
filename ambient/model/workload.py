"""Workloads, services and their endpoints: the objects of discovery, named as in Istio's WDS.

Values only. A workload is anything with an IP address in the cluster, enrolled or not; `TunnelProtocol`
says how peers reach it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from ambient.model.address import IPAddress
from ambient.model.identity import DEFAULT_TRUST_DOMAIN, Identity


class TunnelProtocol(enum.Enum):
    """How a workload is reached. HBONE only while its pod carries ambient.istio.io/redirection=enabled."""

    NONE = 0
    HBONE = 1


class WorkloadStatus(enum.Enum):
    HEALTHY = 0
    UNHEALTHY = 1


class WorkloadType(enum.Enum):
    """The controller kind, which names the metric label ``k8s.<kind>.name``."""

    DEPLOYMENT = 0
    CRONJOB = 1
    POD = 2
    JOB = 3


class AppProtocol(enum.Enum):
    UNKNOWN = 0
    HTTP11 = 1
    HTTP2 = 2
    GRPC = 3
    TCP = 4
    TLS = 5


class LoadBalancingScope(enum.Enum):
    REGION = 1
    ZONE = 2
    SUBZONE = 3
    NODE = 4
    CLUSTER = 5
    NETWORK = 6


class LoadBalancingMode(enum.Enum):
    UNSPECIFIED = 0
    STRICT = 1
    FAILOVER = 2
    PASSTHROUGH = 3


@dataclass(frozen=True, slots=True)
class Port:
    """A service port and the target port behind it, host order. target_port 0: the same number."""

    service_port: int
    target_port: int
    app_protocol: AppProtocol = AppProtocol.UNKNOWN


@dataclass(frozen=True, slots=True)
class Locality:
    region: str = ""
    zone: str = ""
    subzone: str = ""


@dataclass(frozen=True, slots=True)
class GatewayAddress:
    """Where a waypoint is: either ``namespace/hostname`` of its service or an address, and its HBONE port."""

    destination: str | IPAddress
    hbone_port: int = 15008


@dataclass(frozen=True, slots=True)
class LoadBalancing:
    """Endpoint preference of a service. ``preference`` is ordered, the closest match wins."""

    preference: tuple[LoadBalancingScope, ...] = ()
    mode: LoadBalancingMode = LoadBalancingMode.UNSPECIFIED
    allow_unhealthy: bool = False


@dataclass(frozen=True, slots=True)
class Workload:
    """A pod as the mesh sees it (WDS Workload).

    ``uid`` is ``<cluster>//Pod/<namespace>/<name>``, Istio's form. ``services`` maps the service's
    ``namespace/hostname`` to the ports this workload serves for it, as sorted pairs so that the value
    can be compared and hashed. ``policies`` are ``namespace/name`` of policies selecting it by labels.
    """

    uid: str
    name: str
    namespace: str
    addresses: tuple[IPAddress, ...] = ()
    node: str = ""
    service_account: str = "default"
    trust_domain: str = DEFAULT_TRUST_DOMAIN
    protocol: TunnelProtocol = TunnelProtocol.NONE
    status: WorkloadStatus = WorkloadStatus.HEALTHY
    services: tuple[tuple[str, tuple[Port, ...]], ...] = ()
    policies: tuple[str, ...] = ()
    hostname: str = ""
    network: str = ""
    cluster_id: str = "Kubernetes"
    canonical_name: str = ""
    canonical_revision: str = "latest"
    workload_name: str = ""
    workload_type: WorkloadType = WorkloadType.POD
    host_network: bool = False
    native_tunnel: bool = False
    waypoint: GatewayAddress | None = None
    locality: Locality = field(default_factory=Locality)
    capacity: int = 1

    @property
    def identity(self) -> Identity:
        """Raises ValueError if the fields cannot form a SPIFFE ID: such a workload must be refused."""
        return Identity(self.trust_domain, self.namespace, self.service_account)

    @property
    def enrolled(self) -> bool:
        return self.protocol is TunnelProtocol.HBONE


class AddressFamilies(enum.Enum):
    """Which addresses a service has (WDS IPFamilies, same numbers): for a headless one there is no other sign."""

    AUTOMATIC = 0
    IPV4_ONLY = 1
    IPV6_ONLY = 2
    DUAL = 3

    def accepts(self, version: int) -> bool:
        """``version`` is 4 or 6."""
        return self.value in (0, 3) or (self is AddressFamilies.IPV4_ONLY) == (version == 4)


@dataclass(frozen=True, slots=True)
class Service:
    """A Kubernetes Service (WDS Service). ``vips`` is empty for a headless service."""

    name: str
    namespace: str
    hostname: str
    vips: tuple[IPAddress, ...] = ()
    ports: tuple[Port, ...] = ()
    subject_alt_names: tuple[str, ...] = ()
    load_balancing: LoadBalancing = field(default_factory=LoadBalancing)
    waypoint: GatewayAddress | None = None
    network: str = ""
    families: AddressFamilies = AddressFamilies.AUTOMATIC

    @property
    def key(self) -> str:
        """``namespace/hostname``: the resource name and the key in `Workload.services`."""
        return f"{self.namespace}/{self.hostname}"

    def port(self, service_port: int) -> Port | None:
        for port in self.ports:
            if port.service_port == service_port:
                return port
        return None
