"""Services and EndpointSlices: the service, and which pods serve which of its ports.

Only TCP ports are in the mesh; a service with UDP ports alone is still known, for its name. Target ports come
from the slices, where Kubernetes has already resolved named ports per pod.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ambient.errors import ConfigFault
from ambient.manifest import mesh as words
from ambient.manifest import objects
from ambient.manifest.mesh import Mesh
from ambient.manifest.problems import Problem, reference
from ambient.model.address import IPAddress, parse_ip
from ambient.model.workload import (
    AddressFamilies,
    AppProtocol,
    LoadBalancing,
    LoadBalancingMode,
    LoadBalancingScope,
    Port,
    Service,
    TunnelProtocol,
    Workload,
    WorkloadStatus,
)

_SAME_ZONE = (LoadBalancingScope.NETWORK, LoadBalancingScope.REGION, LoadBalancingScope.ZONE)
_SAME_NODE = (*_SAME_ZONE, LoadBalancingScope.SUBZONE, LoadBalancingScope.NODE)
_DISTRIBUTIONS = {
    "PreferClose": _SAME_ZONE,
    "PreferSameZone": _SAME_ZONE,
    "PreferSameNode": _SAME_NODE,
}
_PROTOCOLS = {
    "http": AppProtocol.HTTP11,
    "kubernetes.io/ws": AppProtocol.HTTP11,
    "http2": AppProtocol.HTTP2,
    "kubernetes.io/h2c": AppProtocol.HTTP2,
    "grpc": AppProtocol.GRPC,
    "grpc-web": AppProtocol.HTTP11,
    "tcp": AppProtocol.TCP,
    "https": AppProtocol.TLS,
    "tls": AppProtocol.TLS,
    "kubernetes.io/wss": AppProtocol.TLS,
}


def service_of(service: objects.Service, mesh: Mesh) -> tuple[Service | None, tuple[Problem, ...]]:
    """The service of the mesh, and what was left out. Raises ConfigFault naming the field that is wrong."""
    where = reference("Service", service.namespace, service.name)
    spec = service.spec
    if spec.type == "ExternalName":
        return None, (Problem(where, "spec.type", "ExternalName is left to DNS and not captured", notice=True),)
    vips = []
    for index, text in enumerate(spec.cluster_ips or [spec.cluster_ip]):
        if text in ("", "None"):
            continue
        try:
            vips.append(parse_ip(text))
        except ValueError:
            raise ConfigFault(
                f"{where}: spec.clusterIPs[{index}]", text[:80], "must be an IP address or None"
            ) from None
    ports = []
    for index, port in enumerate(spec.ports or ()):
        _checked_port(f"{where}: spec.ports[{index}].port", port.port)
        if port.protocol == "TCP":
            ports.append(_port(f"{where}: spec.ports[{index}]", port))
    balancing, problems = _load_balancing(service, where)
    hostname = f"{service.name}.{service.namespace}.svc.{mesh.cluster_domain}"
    return (
        Service(
            name=service.name,
            namespace=service.namespace,
            hostname=hostname,
            vips=tuple(dict.fromkeys(vips)),
            ports=tuple(sorted(ports, key=lambda p: p.service_port)),
            load_balancing=balancing,
            families=_families(service.spec.ip_families or ()),
        ),
        problems,
    )


def _families(names: Collection[str]) -> AddressFamilies:
    """What a service says of its families; what is not said, or not known, is not restricted."""
    four, six = "IPv4" in names, "IPv6" in names
    if four and six:
        return AddressFamilies.DUAL
    if four or six:
        return AddressFamilies.IPV4_ONLY if four else AddressFamilies.IPV6_ONLY
    return AddressFamilies.AUTOMATIC


def _checked_port(where: str, number: int) -> int:
    if not 1 <= number <= 65535:
        raise ConfigFault(where, number, "must be a port, 1 to 65535")
    return number


def _port(where: str, port: objects.ServicePort) -> Port:
    target = port.target_port
    if isinstance(target, str):  # named: each pod's slice says which number
        number = int(target) if target.isascii() and target.isdigit() and len(target) < 6 else 0
    else:
        number = target or port.port
    if number:
        _checked_port(f"{where}.targetPort", number)
    return Port(port.port, number, _app_protocol(port))


def _app_protocol(port: objects.ServicePort) -> AppProtocol:
    """By appProtocol, else by the name's first word, as Istio does."""
    if port.app_protocol:
        return _PROTOCOLS.get(port.app_protocol.lower(), AppProtocol.UNKNOWN)
    return _PROTOCOLS.get(port.name.partition("-")[0].lower(), AppProtocol.UNKNOWN)


def _load_balancing(service: objects.Service, where: str) -> tuple[LoadBalancing, tuple[Problem, ...]]:
    spec = service.spec
    unhealthy = spec.publish_not_ready_addresses
    if spec.internal_traffic_policy == "Local":
        return LoadBalancing((LoadBalancingScope.NODE,), LoadBalancingMode.STRICT, unhealthy), ()
    wanted, field = spec.traffic_distribution, "spec.trafficDistribution"
    if not wanted:
        wanted = service.annotations.get(words.TRAFFIC_DISTRIBUTION)
        field = f"metadata.annotations[{words.TRAFFIC_DISTRIBUTION}]"
    if not wanted or wanted == "Any":
        return LoadBalancing(allow_unhealthy=unhealthy), ()
    preference = _DISTRIBUTIONS.get(wanted)
    if preference is None:
        rule = f"{wanted[:60]!r} is not one of {', '.join(_DISTRIBUTIONS)}: endpoints are chosen evenly"
        return LoadBalancing(allow_unhealthy=unhealthy), (Problem(where, field, rule),)
    return LoadBalancing(preference, LoadBalancingMode.FAILOVER, unhealthy), ()


@dataclass(frozen=True, slots=True)
class Member:
    """One endpoint of a slice. ``pod`` is namespace/name, empty for an address without a pod of the slice's namespace.

    ``ports`` are (name, number) of the slice's TCP ports; number 0 stands for every port.
    """

    service: str
    pod: str
    pod_uid: str
    addresses: tuple[IPAddress, ...]
    ready: bool
    node: str
    ports: tuple[tuple[str, int], ...]


def members_of(piece: objects.EndpointSlice) -> tuple[Member, ...]:
    """Endpoints of a slice; none if it belongs to no service or names hosts. Raises ConfigFault."""
    name = piece.labels.get(words.SERVICE_NAME)
    if not name or piece.address_type not in ("IPv4", "IPv6"):
        return ()
    where = reference("EndpointSlice", piece.namespace, piece.name)
    ports = []
    for index, port in enumerate(piece.ports or ()):
        if (port.protocol or "TCP") == "TCP":
            number = port.port or 0
            if number:
                _checked_port(f"{where}: ports[{index}].port", number)
            ports.append((port.name or "", number))
    members = []
    for index, endpoint in enumerate(piece.endpoints or ()):
        addresses = []
        for text in endpoint.addresses or ():
            try:
                addresses.append(parse_ip(text))
            except ValueError:
                raise ConfigFault(
                    f"{where}: endpoints[{index}].addresses", text[:80], "must be an IP address"
                ) from None
        target = endpoint.target_ref
        # a service has pods of its own namespace: whoever may write slices does not write on the pods of others
        is_pod = target is not None and target.kind == "Pod" and target.namespace in ("", piece.namespace)
        members.append(
            Member(
                service=f"{piece.namespace}/{name}",
                pod=f"{piece.namespace}/{target.name}" if target and is_pod else "",
                pod_uid=target.uid if target and is_pod else "",
                addresses=tuple(addresses),
                ready=endpoint.conditions.ready is not False,
                node=endpoint.node_name or "",
                ports=tuple(ports),
            )
        )
    return tuple(members)


def ports_served(service: objects.Service, members: Iterable[Member]) -> tuple[Port, ...]:
    """The service's TCP ports with the numbers these members (of one pod) serve them on, sorted."""
    numbers: dict[str, int] = {}
    for member in members:
        for name, number in member.ports:
            numbers.setdefault(name, number)
    ports = []
    for port in service.spec.ports or ():
        if port.protocol == "TCP" and port.name in numbers:
            ports.append(Port(port.port, numbers[port.name] or port.port, _app_protocol(port)))
    return tuple(sorted(ports, key=lambda p: p.service_port))


def service_key(key: str, mesh: Mesh) -> str:
    """``namespace/name`` as the World has it: ``namespace/hostname``."""
    namespace, _, name = key.partition("/")
    return f"{namespace}/{name}.{namespace}.svc.{mesh.cluster_domain}"


def outside(key: str, member: Member, service: objects.Service, mesh: Mesh) -> Iterable[Workload]:
    """The addresses of a member that is no pod: endpoints outside the mesh. ``key`` is its slice's."""
    if service.spec.type == "ExternalName":
        return
    namespace, _, name = key.partition("/")
    for address in member.addresses:
        yield Workload(
            uid=f"{mesh.cluster_id}/discovery.k8s.io/EndpointSlice/{namespace}/{name}/{address}",
            name=str(address),
            namespace=namespace,
            addresses=(address,),
            node=member.node,
            trust_domain=mesh.trust_domain,
            protocol=TunnelProtocol.NONE,
            status=WorkloadStatus.HEALTHY if member.ready else WorkloadStatus.UNHEALTHY,
            services=((service_key(member.service, mesh), ports_served(service, (member,))),),
            cluster_id=mesh.cluster_id,
            canonical_name=service.name,
            workload_name=service.name,
            host_network=True,
        )
