"""Who is at either end of a connection, for metrics and the access log: a pure reading of the World.

The pod this ztunnel serves is known from the node. The other end is the workload the World has at its address,
unless the identity it proved is another one: then only what the identity says is believed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from ambient.model.address import IPAddress, SocketAddress
from ambient.model.identity import Identity
from ambient.model.workload import Workload
from ambient.model.world import World
from ambient.node.messages import Pod
from ztunnel.core.local import Local, identity_of, is_same
from ztunnel.core.messages import ConnectionEvent

UNKNOWN: Final = "unknown"
KEPT_MAX: Final = 4096


@dataclass(frozen=True, slots=True)
class Party:
    """One end. Empty where not known."""

    uid: str = ""
    """WDS uid."""
    name: str = ""
    """Of the pod."""
    workload: str = ""
    """Of what the pod belongs to: a Deployment, a Job."""
    namespace: str = ""
    principal: str = ""
    """SPIFFE ID."""
    canonical_service: str = ""
    canonical_revision: str = ""
    cluster: str = ""
    region: str = ""
    zone: str = ""


@dataclass(frozen=True, slots=True)
class Ends:
    source: Party = field(default_factory=Party)
    destination: Party = field(default_factory=Party)
    service_host: str = ""
    service_namespace: str = ""
    service_name: str = ""


class Descriptions:
    """`describe`, with what it found kept for as long as World and pods are the same: connections of the same two
    ends differ only in the client's port, which says nothing about who it is."""

    def __init__(self) -> None:
        self._world: World | None = None
        self._local: Local | None = None
        self._kept: dict[tuple[str, ...], Ends] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def describe(self, world: World | None, local: Local, event: ConnectionEvent) -> Ends:
        if world is not self._world or local is not self._local or len(self._kept) >= KEPT_MAX:
            self._world, self._local = world, local
            self._kept.clear()
        key = (
            event.reporter,
            event.local,
            event.service,
            event.destination,
            event.destination_address,
            event.destination_identity,
            event.source_identity,
            event.source_address.rpartition(":")[0],
        )
        ends = self._kept.get(key)
        if ends is None:
            ends = self._kept[key] = describe(world, local, event)
        return ends


def describe(world: World | None, local: Local, event: ConnectionEvent) -> Ends:
    """Never raises: what the event says wrongly is left out."""
    world = world or World()
    at_source = event.reporter == "source"
    ours = _local_party(world, local, event.local)
    if at_source:
        source = ours
        destination = _remote_party(world, event.destination, event.destination_address, event.destination_identity)
    else:
        source = _remote_party(world, "", event.source_address, event.source_identity)
        destination = ours
    service = event.service
    if not service and not at_source:
        service = _service_of(world.workloads.get(ours.uid), _port(event.destination_address))
    if not service:
        return Ends(source, destination)
    namespace, _, host = service.partition("/")
    known = world.services.get(service)
    return Ends(source, destination, host, namespace, known.name if known else host.partition(".")[0])


def _local_party(world: World, local: Local, uid: str) -> Party:
    pod = local.pods.get(uid)
    if pod is None:
        return Party()
    try:
        principal = str(identity_of(pod))
    except ValueError:
        principal = ""
    workload = world.workloads.get(pod.workload_uid)
    if workload is None or not is_same(pod, workload):
        return _of_pod(pod, principal)
    return _of_workload(workload, principal)


def _of_pod(pod: Pod, principal: str) -> Party:
    return Party(uid=pod.workload_uid, name=pod.name, workload=pod.name, namespace=pod.namespace, principal=principal)


def _of_workload(workload: Workload, principal: str) -> Party:
    return Party(
        uid=workload.uid,
        name=workload.name,
        workload=workload.workload_name or workload.name,
        namespace=workload.namespace,
        principal=principal,
        canonical_service=workload.canonical_name,
        canonical_revision=workload.canonical_revision,
        cluster=workload.cluster_id,
        region=workload.locality.region,
        zone=workload.locality.zone,
    )


def _remote_party(world: World, uid: str, address: str, identity: str) -> Party:
    workload = world.workloads.get(uid) if uid else None
    if workload is None:
        ip = _ip(address)
        workload = world.workload_at(ip) if ip is not None else None
    proved: Identity | None = None
    if identity:
        try:
            proved = Identity.parse(identity)
        except ValueError:
            return Party()
    if workload is not None and (proved is None or _identity(workload) == proved):
        return _of_workload(workload, identity)
    if proved is None:
        return Party()
    return Party(namespace=proved.namespace, principal=identity)


def _identity(workload: Workload) -> Identity | None:
    try:
        return workload.identity
    except ValueError:
        return None


def _service_of(workload: Workload | None, port: int) -> str:
    """The service an inbound connection was probably meant for: the first that has this target port."""
    if workload is None:
        return ""
    for key, ports in sorted(workload.services, key=lambda pair: pair[0]):
        if any((p.target_port or p.service_port) == port for p in ports):
            return key
    return ""


def _ip(address: str) -> IPAddress | None:
    try:
        return SocketAddress.parse(address).ip
    except ValueError:
        return None


def _port(address: str) -> int:
    try:
        return SocketAddress.parse(address).port
    except ValueError:
        return 0
