"""Model objects <-> discovery resources (Istio's WDS and Authorization messages).

Writing is exact and deterministic, so a resource's version is the hash of its bytes and equal objects never
travel twice. Reading is strict, because what arrives decides who may talk to whom: a length, enum value,
port or identity that cannot be right is a PeerFault that names the resource and the field. Fields this mesh
does not act upon are ignored only if ignoring them cannot weaken or misroute anything.
"""

from __future__ import annotations

import enum
import hashlib
import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from google.protobuf.message import DecodeError

from ambient.errors import PeerFault
from ambient.model.address import IPAddress, IPNetwork, unpack_ip
from ambient.model.identity import DEFAULT_TRUST_DOMAIN
from ambient.model.workload import (
    AddressFamilies,
    AppProtocol,
    GatewayAddress,
    LoadBalancing,
    LoadBalancingMode,
    LoadBalancingScope,
    Locality,
    Port,
    Service,
    TunnelProtocol,
    Workload,
    WorkloadStatus,
    WorkloadType,
)
from ambient.proto import discovery_pb2, workload_pb2

ADDRESS_TYPE: Final = "type.googleapis.com/istio.workload.Address"
AUTHORIZATION_TYPE: Final = "type.googleapis.com/istio.security.Authorization"

NAME_BYTES_MAX: Final = 1024
"""Longest resource name that is taken: cluster, namespace and name of Kubernetes fit many times over."""

_DEFAULT_SERVICE_ACCOUNT = "default"
_RESOURCES_TAG = 0x12  # DeltaDiscoveryResponse.resources: field 2, length-delimited
_EnumT = TypeVar("_EnumT", bound=enum.Enum)


@dataclass(frozen=True, slots=True)
class Resource:
    """A resource ready to be sent. ``wire`` is a whole ``resources`` field of a DeltaDiscoveryResponse:
    protobuf lets fields be concatenated, so a response is a join of these and nothing is encoded twice."""

    type_url: str
    name: str
    version: str
    wire: bytes
    aliases: tuple[str, ...] = ()
    """``network/address`` names under which the resource may be asked for."""
    hbone: bool = False
    """Whether peers that have this version reach the workload by HBONE."""


def seal(type_url: str, name: str, body: bytes, aliases: tuple[str, ...] = (), hbone: bool = False) -> Resource:
    """Wrap the bytes of a message; the version is a hash of them (collisions: 2^-64 per pair)."""
    version = hashlib.blake2b(body, digest_size=8).hexdigest()
    message = discovery_pb2.Resource(version=version, name=name, aliases=aliases)
    message.resource.type_url = type_url
    message.resource.value = body
    inner = message.SerializeToString(deterministic=True)
    return Resource(type_url, name, version, field_bytes(_RESOURCES_TAG, inner), aliases, hbone)


def field_bytes(tag: int, value: bytes) -> bytes:
    """One length-delimited protobuf field."""
    length, head = len(value), bytearray((tag,))
    while length > 0x7F:
        head.append(0x80 | length & 0x7F)
        length >>= 7
    head.append(length)
    return bytes(head) + value


# ---- writing ----


def encode_workload(workload: Workload) -> Resource:
    message = workload_pb2.Address()
    out = message.workload
    out.uid, out.name, out.namespace = workload.uid, workload.name, workload.namespace
    out.addresses.extend(a.packed for a in workload.addresses)
    out.hostname, out.network, out.node = workload.hostname, workload.network, workload.node
    out.tunnel_protocol = workload.protocol.value  # type: ignore[assignment]  # stubs hide ints
    if workload.trust_domain != DEFAULT_TRUST_DOMAIN:
        out.trust_domain = workload.trust_domain
    if workload.service_account != _DEFAULT_SERVICE_ACCOUNT:
        out.service_account = workload.service_account
    out.canonical_name, out.canonical_revision = workload.canonical_name, workload.canonical_revision
    out.workload_name, out.native_tunnel, out.cluster_id = (
        workload.workload_name,
        workload.native_tunnel,
        workload.cluster_id,
    )
    out.workload_type = workload.workload_type.value  # type: ignore[assignment]
    out.status = workload.status.value  # type: ignore[assignment]
    out.authorization_policies.extend(workload.policies)
    if workload.host_network:
        out.network_mode = workload_pb2.HOST_NETWORK
    if workload.capacity != 1:
        out.capacity.value = workload.capacity
    if workload.locality != Locality():
        place = workload.locality
        out.locality.region, out.locality.zone, out.locality.subzone = place.region, place.zone, place.subzone
    for key, ports in workload.services:
        _put_ports(out.services[key].ports, ports)
    if workload.waypoint is not None:
        _put_gateway(out.waypoint, workload.waypoint, workload.network)
    aliases = () if workload.host_network else tuple(f"{workload.network}/{a}" for a in workload.addresses)
    body = message.SerializeToString(deterministic=True)
    return seal(ADDRESS_TYPE, workload.uid, body, aliases, workload.enrolled)


def encode_service(service: Service) -> Resource:
    """A headless service has no address and so no place for ``network`` on the wire."""
    message = workload_pb2.Address()
    out = message.service
    out.name, out.namespace, out.hostname = service.name, service.namespace, service.hostname
    for vip in service.vips:
        out.addresses.add(network=service.network, address=vip.packed)
    _put_ports(out.ports, service.ports)
    out.subject_alt_names.extend(service.subject_alt_names)
    out.ip_families = service.families.value  # type: ignore[assignment]
    if service.load_balancing != LoadBalancing():
        balance = service.load_balancing
        out.load_balancing.routing_preference.extend(s.value for s in balance.preference)  # type: ignore[misc]
        out.load_balancing.mode = balance.mode.value  # type: ignore[assignment]
        if balance.allow_unhealthy:
            out.load_balancing.health_policy = workload_pb2.LoadBalancing.ALLOW_ALL
    if service.waypoint is not None:
        _put_gateway(out.waypoint, service.waypoint, service.network)
    aliases = tuple(f"{service.network}/{vip}" for vip in service.vips)
    return seal(ADDRESS_TYPE, service.key, message.SerializeToString(deterministic=True), aliases)


def _put_ports(out: object, ports: Iterable[Port]) -> None:
    for port in ports:
        out.add(  # type: ignore[attr-defined]  # a repeated composite field, whose stub type is not importable
            service_port=port.service_port, target_port=port.target_port, app_protocol=port.app_protocol.value
        )


def _put_gateway(out: workload_pb2.GatewayAddress, gateway: GatewayAddress, network: str) -> None:
    out.hbone_mtls_port = gateway.hbone_port
    if isinstance(gateway.destination, str):
        out.hostname.namespace, _, out.hostname.hostname = gateway.destination.partition("/")
    else:
        out.address.network, out.address.address = network, gateway.destination.packed


# ---- reading ----


def decode_address(name: str, body: bytes) -> Workload | Service:
    """Read an Address. Raises PeerFault naming the resource and the field."""
    message = workload_pb2.Address()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise fault(name, "", f"not an istio.workload.Address: {error}") from None
    match message.WhichOneof("type"):
        case "workload":
            return _read_workload(name, message.workload)
        case "service":
            return _read_service(name, message.service)
        case _:
            raise fault(name, "type", "neither workload nor service")


def fault(name: str, field: str, problem: str) -> PeerFault:
    return PeerFault(f"{name[:NAME_BYTES_MAX]}: {field + ': ' if field else ''}{problem}")


def read_enum(name: str, field: str, kind: type[_EnumT], value: int) -> _EnumT:
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(str(member.value) for member in kind)
        raise fault(name, field, f"unknown value {value}; known are {known}") from None


def read_port(name: str, field: str, port: int, least: int = 1) -> int:
    if not least <= port <= 65535:
        raise fault(name, field, f"{port} is not a port ({least} to 65535)")
    return port


def read_ip(name: str, field: str, raw: bytes) -> IPAddress:
    try:
        return unpack_ip(raw)
    except ValueError as error:
        raise fault(name, field, str(error)) from None


def read_key(name: str, field: str, key: str) -> str:
    """A ``namespace/name`` reference."""
    namespace, separator, rest = key.partition("/")
    if not (namespace and separator and rest):
        raise fault(name, field, f"{key[:200]!r} is not NAMESPACE/NAME")
    return key


def _read_workload(name: str, message: workload_pb2.Workload) -> Workload:
    if message.uid != name:
        raise fault(name, "uid", f"{message.uid[:200]!r} is not the resource's name")
    if message.tunnel_protocol == workload_pb2.LEGACY_ISTIO_MTLS:
        raise fault(name, "tunnel_protocol", "LEGACY_ISTIO_MTLS is not spoken by this mesh")
    if message.HasField("network_gateway"):
        raise fault(name, "network_gateway", "workloads of other networks are not supported")
    if message.application_tunnel.protocol:
        raise fault(name, "application_tunnel", "not supported: the application would miss its PROXY header")
    capacity = message.capacity.value if message.HasField("capacity") else 1
    workload = Workload(
        uid=message.uid,
        name=message.name,
        namespace=message.namespace,
        addresses=tuple(read_ip(name, "addresses", raw) for raw in message.addresses),
        node=message.node,
        service_account=message.service_account or _DEFAULT_SERVICE_ACCOUNT,
        trust_domain=message.trust_domain or DEFAULT_TRUST_DOMAIN,
        protocol=read_enum(name, "tunnel_protocol", TunnelProtocol, message.tunnel_protocol),
        status=read_enum(name, "status", WorkloadStatus, message.status),
        services=tuple(
            (read_key(name, "services", key), _read_ports(name, f"services[{key}].ports", message.services[key].ports))
            for key in sorted(message.services)
        ),
        policies=tuple(read_key(name, "authorization_policies", key) for key in message.authorization_policies),
        hostname=message.hostname,
        network=message.network,
        cluster_id=message.cluster_id,
        canonical_name=message.canonical_name,
        canonical_revision=message.canonical_revision,
        workload_name=message.workload_name,
        workload_type=read_enum(name, "workload_type", WorkloadType, message.workload_type),
        host_network=_read_network_mode(name, message.network_mode),
        native_tunnel=message.native_tunnel,
        waypoint=_read_gateway(name, message.waypoint, message.network) if message.HasField("waypoint") else None,
        locality=Locality(message.locality.region, message.locality.zone, message.locality.subzone),
        capacity=capacity,
    )
    try:
        _ = workload.identity
    except ValueError as error:
        raise fault(name, "identity", str(error)) from None
    return workload


def _read_network_mode(name: str, value: int) -> bool:
    if value not in (workload_pb2.STANDARD, workload_pb2.HOST_NETWORK):
        raise fault(name, "network_mode", f"unknown value {value}; known are 0, 1")
    return value == workload_pb2.HOST_NETWORK


def _read_service(name: str, message: workload_pb2.Service) -> Service:
    if not message.namespace or not message.hostname:
        raise fault(name, "hostname" if message.namespace else "namespace", "is empty")
    networks = {address.network for address in message.addresses}
    if len(networks) > 1:
        raise fault(name, "addresses", f"of several networks: {', '.join(sorted(networks))}")
    balance = message.load_balancing
    if balance.health_policy not in (workload_pb2.LoadBalancing.ONLY_HEALTHY, workload_pb2.LoadBalancing.ALLOW_ALL):
        raise fault(name, "load_balancing.health_policy", f"unknown value {balance.health_policy}; known are 0, 1")
    service = Service(
        name=message.name,
        namespace=message.namespace,
        hostname=message.hostname,
        vips=tuple(_read_network_address(name, "addresses", address) for address in message.addresses),
        ports=_read_ports(name, "ports", message.ports),
        subject_alt_names=tuple(message.subject_alt_names),
        load_balancing=LoadBalancing(
            preference=tuple(
                read_enum(name, "load_balancing.routing_preference", LoadBalancingScope, value)
                for value in balance.routing_preference
            ),
            mode=read_enum(name, "load_balancing.mode", LoadBalancingMode, balance.mode),
            allow_unhealthy=balance.health_policy == workload_pb2.LoadBalancing.ALLOW_ALL,
        ),
        waypoint=_read_gateway(name, message.waypoint, next(iter(networks), ""))
        if message.HasField("waypoint")
        else None,
        network=next(iter(networks), ""),
        families=read_enum(name, "ip_families", AddressFamilies, message.ip_families),
    )
    if service.key != name:
        raise fault(name, "hostname", f"{service.key[:200]!r} is not the resource's name")
    return service


def _read_ports(name: str, field: str, ports: Sequence[workload_pb2.Port]) -> tuple[Port, ...]:
    return tuple(
        Port(
            read_port(name, f"{field}.service_port", port.service_port),
            read_port(name, f"{field}.target_port", port.target_port, least=0),
            read_enum(name, f"{field}.app_protocol", AppProtocol, port.app_protocol),
        )
        for port in ports
    )


def _read_network_address(name: str, field: str, message: workload_pb2.NetworkAddress) -> IPAddress:
    if message.HasField("length") and message.length.value != 8 * len(message.address):
        raise fault(name, field, f"prefix length {message.length.value}: ranges are not supported, only addresses")
    return read_ip(name, field, message.address)


def _read_gateway(name: str, message: workload_pb2.GatewayAddress, network: str) -> GatewayAddress:
    port = read_port(name, "waypoint.hbone_mtls_port", message.hbone_mtls_port)
    match message.WhichOneof("destination"):
        case "hostname":
            key = f"{message.hostname.namespace}/{message.hostname.hostname}"
            return GatewayAddress(read_key(name, "waypoint.hostname", key), port)
        case "address":
            if message.address.network != network:
                raise fault(name, "waypoint.address.network", "a waypoint in another network is not supported")
            return GatewayAddress(_read_network_address(name, "waypoint.address", message.address), port)
        case _:
            raise fault(name, "waypoint", "neither hostname nor address")


def read_network(name: str, field: str, raw: bytes, length: int) -> IPNetwork:
    """An address range; host bits are dropped, an IPv4-mapped range is the IPv4 range."""
    if len(raw) == 16 and raw[:12] == bytes(10) + b"\xff\xff" and length >= 96:
        raw, length = raw[12:], length - 96
    if len(raw) not in (4, 16):
        raise fault(name, field, f"an IP address has 4 or 16 bytes, not {len(raw)}")
    if length > 8 * len(raw):
        raise fault(name, field, f"prefix length {length} is more than {8 * len(raw)}")
    return ipaddress.ip_network((raw, length), strict=False)
