"""Where a captured connection goes: a pure decision from the World to a `Route`.

With Istio's meaning of services, endpoints and load-balancing preferences. What is not known to the mesh passes
in plaintext to where the application wanted to go, as without a mesh; what is known and cannot be reached as
the mesh demands is refused with a reason.

Two refusals deserve their why:

* A port that a known service does not have (``no_port``). A virtual address is no host: passing the
  connection on could only reach it through somebody else's address rewriting, in plaintext and past every policy.
* A destination with a waypoint. Its owner put layer 7 policy there, and going to the endpoint directly
  would go around it: ``waypoint_unsupported``, and ``waypoint_unresolved`` where the World names a waypoint
  that it does not know (deleted, or not yet told), which must fail the same way.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from msgspec.structs import replace

from ambient.model.address import IPAddress, SocketAddress, fold, parse_ip
from ambient.model.balancing import Here, prefer
from ambient.model.workload import GatewayAddress, LoadBalancingMode, Service, Workload, WorkloadType
from ambient.model.world import Endpoint, World
from ambient.node.messages import Pod
from ambient.ports import GUARDED, HBONE
from ztunnel.core.local import Local, identity_of, is_same
from ztunnel.core.messages import AskRoute, Hop, Route

HOPS_MAX: Final = 4096
"""Endpoints of one route; beyond that the first in uid order serve."""
_BAGGAGE_KIND = {
    WorkloadType.DEPLOYMENT: "deployment",
    WorkloadType.CRONJOB: "cronjob",
    WorkloadType.POD: "pod",
    WorkloadType.JOB: "job",
}


class Touched:
    """Names of what a decision looked at; it must be made again when one of them changes."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def workload(self, uid: str) -> None:
        self.names.add(f"w:{uid}")

    def address(self, address: IPAddress) -> None:
        self.names.add(f"a:{address}")

    def service(self, key: str) -> None:
        self.names.add(f"s:{key}")

    def pod(self, uid: str) -> None:
        self.names.add(f"pod:{uid}")

    def policy(self, key: str) -> None:
        self.names.add(f"p:{key}")

    def policies_of(self, namespace: str) -> None:
        """Mesh-wide policies and those of a namespace."""
        self.names.update(("P*", f"P:{namespace}"))


class _Refused(Exception):
    """Ends a decision early; never leaves this module."""

    def __init__(self, reason: str, message: str, service: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.service = service


def decide_route(
    world: World | None, local: Local, ask: AskRoute, generation: int, touched: Touched | None = None
) -> Route:
    """Decide; never raises. ``touched`` is filled with what the answer rests on."""
    touched = touched if touched is not None else Touched()
    answer = Route(source=ask.source, ip=ask.ip, port=ask.port, generation=generation, kind="refused")
    touched.pod(ask.source)
    try:
        kind, hops, service, pod, source = _decide(world, local, ask, touched)
    except _Refused as refused:
        return replace(answer, reason=refused.reason, message=str(refused), service=refused.service)
    return replace(
        answer,
        kind=kind,
        hops=hops,
        service=service,
        identity=str(identity_of(pod)),
        baggage=baggage(pod, source) if kind == "hbone" else "",
    )


def _decide(
    world: World | None, local: Local, ask: AskRoute, touched: Touched
) -> tuple[str, tuple[Hop, ...], str, Pod, Workload | None]:
    if world is None:
        raise _Refused("not_synced", "the control plane has not told what there is; is it reachable?")
    pod = local.pods.get(ask.source)
    if pod is None:
        raise _Refused("unknown_source", f"pod {ask.source} is not enrolled on this node")
    try:
        identity_of(pod)
        ip = parse_ip(ask.ip)
    except ValueError as error:
        raise _Refused("malformed", str(error)) from None
    if not 0 < ask.port <= 65535:
        raise _Refused("malformed", f"port {ask.port}")
    touched.workload(pod.workload_uid)
    touched.address(ip)
    source = world.workloads.get(pod.workload_uid)
    if source is not None and not is_same(pod, source):
        source = None
    network = source.network if source is not None else ""
    service = world.service_at(ip, network)
    workload = world.workload_at(ip, network)
    if ask.port in GUARDED and (ip.is_loopback or local.owner(ip) or service or (workload and workload.enrolled)):
        raise _Refused("recursion", f"port {ask.port} of {ip} belongs to the mesh itself")
    if service is not None and service.load_balancing.mode is not LoadBalancingMode.PASSTHROUGH:
        hops = _to_service(world, local, pod, source, service, ip, ask.port, touched)
        return ("hbone" if any(h.authority for h in hops) else "tcp"), hops, service.key, pod, source
    if workload is None:
        target = SocketAddress(ip, ask.port)
        return "tcp", (Hop(ip=str(ip), port=ask.port, endpoint=str(target)),), "", pod, source
    touched.workload(workload.uid)
    if local.contradicts(workload, ip):
        raise _Refused(
            "stale_destination",
            f"{ip} was given to another pod of this node than {workload.uid}; waiting for the control plane",
        )
    _refuse_waypoint(world, workload.waypoint, workload.uid, network, touched)
    hop = _hop(workload, ip, ask.port, ())
    if hop is None:
        raise _Refused("malformed", f"workload {workload.uid} has no valid identity")
    return ("hbone" if hop.authority else "tcp"), (hop,), "", pod, source


def _to_service(
    world: World,
    local: Local,
    pod: Pod,
    source: Workload | None,
    service: Service,
    vip: IPAddress,
    port: int,
    touched: Touched,
) -> tuple[Hop, ...]:
    touched.service(service.key)
    network = source.network if source is not None else ""
    try:
        _refuse_waypoint(world, service.waypoint, f"service {service.key}", network, touched)
    except _Refused as refused:
        refused.service = service.key
        raise
    if service.port(port) is None:
        raise _Refused("no_port", f"service {service.key} has no port {port}", service.key)
    endpoints = [e for e in world.endpoints(service, port) if e.workload.addresses]
    usable: list[tuple[Endpoint, IPAddress]] = []
    for endpoint in endpoints:
        address = _address_for(endpoint.workload, vip)
        touched.address(address)
        if not local.contradicts(endpoint.workload, address):
            usable.append((endpoint, address))
    here = Here(local.node, source)
    preferred = set(prefer(here, (e.workload for e, _ in usable), service.load_balancing))
    hops: list[Hop] = []
    for endpoint, address in usable:
        workload = endpoint.workload
        if workload.uid not in preferred or workload.capacity <= 0:
            continue
        target_port = endpoint.port.target_port or port
        if target_port in GUARDED and workload.enrolled:
            continue
        hop = _hop(workload, address, target_port, service.subject_alt_names)
        if hop is not None:
            hops.append(hop)
    if not hops:
        raise _Refused("no_endpoint", f"service {service.key} has no healthy endpoint for port {port}", service.key)
    return tuple(hops[:HOPS_MAX])


def _hop(workload: Workload, ip: IPAddress, port: int, alternatives: Iterable[str]) -> Hop | None:
    """None if the workload has no valid identity: it could not be proved whom we reach."""
    target = str(SocketAddress(ip, port))
    weight = max(1, workload.capacity)
    if not (workload.enrolled or workload.native_tunnel):
        return Hop(ip=str(ip), port=port, destination=workload.uid, endpoint=target, weight=weight)
    try:
        identity = str(workload.identity)
    except ValueError:
        return None
    return Hop(
        ip=str(ip),
        port=HBONE,
        authority=target,
        identities=tuple(dict.fromkeys((identity, *alternatives))),
        destination=workload.uid,
        endpoint=target,
        weight=weight,
    )


def _address_for(workload: Workload, vip: IPAddress) -> IPAddress:
    """The workload's address of the family that was asked for, else its first."""
    for address in workload.addresses:
        if fold(address).version == vip.version:
            return fold(address)
    return fold(workload.addresses[0])


def _refuse_waypoint(world: World, waypoint: GatewayAddress | None, whose: str, network: str, touched: Touched) -> None:
    if waypoint is None:
        return
    at = waypoint.destination
    if isinstance(at, str):
        touched.service(at)
        known = at in world.services
    else:
        touched.address(at)
        known = world.service_at(at, network) is not None or world.workload_at(at, network) is not None
    if known:
        raise _Refused(
            "waypoint_unsupported",
            f"{whose} wants its traffic to pass waypoint {at}, and this version has no waypoints: "
            "going around it would go around its policies; remove istio.io/use-waypoint",
        )
    raise _Refused("waypoint_unresolved", f"{whose} wants its traffic to pass waypoint {at}, which is not known")


def baggage(pod: Pod, workload: Workload | None) -> str:
    """Istio's ``baggage`` header of a source: who it is, for the peer's metrics. Empty values are left out."""
    if workload is None:
        values = {
            "k8s.namespace.name": pod.namespace,
            "k8s.pod.name": pod.name,
        }
    else:
        kind = _BAGGAGE_KIND[workload.workload_type]
        values = {
            "k8s.cluster.name": workload.cluster_id,
            "k8s.namespace.name": workload.namespace,
            f"k8s.{kind}.name": workload.workload_name or workload.name,
            "service.name": workload.canonical_name,
            "service.version": workload.canonical_revision,
            "cloud.region": workload.locality.region,
            "cloud.availability_zone": workload.locality.zone,
        }
    return ",".join(f"{key}={value}" for key, value in values.items() if value and _is_plain(value))


def _is_plain(value: str) -> bool:
    """Whether a value may stand in a header as it is: no separator, no control character, ASCII."""
    return len(value) <= 253 and all(c.isascii() and c.isprintable() and c not in ',;="\\ ' for c in value)
