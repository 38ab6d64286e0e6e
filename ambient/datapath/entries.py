"""From what is known to what the kernel shall hold: the entries of `workloads` and `services`, and rights.

The addresses of this node's pods come from the agent (`LocalPod`) and from nowhere else: discovery lags
behind, and an address that was given to another pod must not name its former owner for a moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ambient.datapath.layout import LAYOUT
from ambient.datapath.numbers import Numbers
from ambient.datapath.values import ServiceKey, ServiceValue, WorkloadValue
from ambient.datapath.verdicts import in_force, is_strict
from ambient.manifest.acceleration import Acceleration
from ambient.model.address import fold, parse_ip
from ambient.model.identity import Identity
from ambient.model.policy import Policy, Scope
from ambient.model.workload import Workload
from ambient.model.world import World

ENROLLED = LAYOUT["WORKLOAD_ENROLLED"]
LOCAL = LAYOUT["WORKLOAD_LOCAL"]
WAYPOINT = LAYOUT["WORKLOAD_WAYPOINT"]
ALLOW_ANY = LAYOUT["WORKLOAD_ALLOW_ANY"]
OPEN = LAYOUT["WORKLOAD_OPEN"]
BYPASS = LAYOUT["WORKLOAD_BYPASS"]
_ACCELERATION = {
    kind: (LAYOUT[f"ENROLLED_{kind.name}"], LAYOUT[f"WORKLOAD_{kind.name}"])
    for kind in (Acceleration.OFF, Acceleration.DIRECT, Acceleration.REDIRECT)
}


@dataclass(frozen=True, slots=True)
class LocalPod:
    """A pod of this node as the agent knows it. ``generation`` is another one for each pod at an address."""

    workload_uid: str
    addresses: tuple[str, ...]
    generation: int
    enrolled: bool
    open: bool = False
    """Not captured any more once the agent's heartbeat has stopped."""
    bypass: bool = False
    """Not captured: an operator said so."""
    identity: Identity | None = None
    """None: it has no valid one."""
    acceleration: Acceleration = Acceleration.OFF
    """Never AUTO."""


@dataclass(frozen=True, slots=True)
class Rights:
    """All that decides who may reach a pod of this node through the kernel; another one is another generation."""

    flags: int
    """WORKLOAD_*: what the kernel shall know of it."""
    policies: tuple[Policy, ...] | None
    """In force at it; None: the World does not know this very pod (yet), so nobody knows."""


def enrolled_flags(acceleration: Acceleration) -> int:
    """ENROLLED_* for what a pod wants as a source."""
    return _ACCELERATION[acceleration][0]


class _Policies:
    """Which workloads no policy selects, without asking every policy about every workload."""

    def __init__(self, world: World) -> None:
        self._known = world.policies
        self._everywhere = any(p.scope is Scope.GLOBAL for p in world.policies.values())
        self._namespaces = {p.namespace for p in world.policies.values() if p.scope is Scope.NAMESPACE}

    def allow_any(self, workload: Workload) -> bool:
        return not (
            self._everywhere
            or workload.namespace in self._namespaces
            or any(key in self._known for key in workload.policies)
        )


def _flags(workload: Workload, policies: _Policies) -> int:
    """The part of the flags that discovery knows, wherever the workload runs."""
    return (WAYPOINT if workload.waypoint else 0) | (ALLOW_ANY if policies.allow_any(workload) else 0)


def remote_workloads(world: World, node: str, numbers: Numbers) -> dict[str, WorkloadValue]:
    """Address -> entry of every workload that runs elsewhere. hostNetwork workloads are never keys."""
    policies = _Policies(world)
    found: dict[str, WorkloadValue] = {}
    for workload in world.workloads.values():
        if workload.host_network or workload.node == node:
            continue
        number = numbers.of(workload.uid)
        flags = _flags(workload, policies) | (ENROLLED if workload.enrolled else 0)
        for address in workload.addresses:
            found[str(address)] = WorkloadValue(number, flags, number)
    return found


def rights(world: World, pods: Iterable[LocalPod], *, strict_means_off: bool = False) -> dict[LocalPod, Rights]:
    """What each pod of this node has to grant.

    The World may know an earlier pod of the same name, with other labels and so other policies: it counts only if
    identity and addresses are those of this one.
    """
    policies = _Policies(world)
    found: dict[LocalPod, Rights] = {}
    for pod in pods:
        known = world.workloads.get(pod.workload_uid)
        in_world = known is not None and _is_same(pod, known)
        flags = LOCAL | (_flags(known, policies) if known and in_world else 0)
        if known and known.waypoint:
            flags |= WAYPOINT
        selecting = in_force(world.policies_for(known)) if known and in_world else None
        if pod.enrolled:
            off = strict_means_off and selecting is not None and is_strict(selecting)
            flags |= ENROLLED | (OPEN if pod.open else 0) | (BYPASS if pod.bypass else 0)
            flags |= _ACCELERATION[Acceleration.OFF if off else pod.acceleration][1]
        found[pod] = Rights(flags, selecting)
    return found


def _is_same(pod: LocalPod, workload: Workload) -> bool:
    try:
        identity = workload.identity
    except ValueError:
        return False
    addresses = {fold(a) for a in workload.addresses}
    return identity == pod.identity and all(fold(parse_ip(a)) in addresses for a in pod.addresses)


def local_workloads(
    granted: Mapping[LocalPod, Rights], generation_of: Callable[[LocalPod], int], numbers: Numbers
) -> dict[str, WorkloadValue]:
    """Address -> entry of this node's pods; of two that claim an address the one that came later has it."""
    found: dict[str, WorkloadValue] = {}
    for pod in sorted(granted, key=lambda p: p.generation):
        for address in pod.addresses:
            found[address] = WorkloadValue(numbers.of(pod.workload_uid), granted[pod].flags, generation_of(pod))
    return found


def services(
    world: World, numbers: Numbers, slots: Mapping[tuple[int, int], int] | None = None
) -> dict[ServiceKey, ServiceValue]:
    """VIP and port -> entry, of every service. ``slots`` by service number and port."""
    slots = slots or {}
    return {
        ServiceKey(str(vip), port.service_port): ServiceValue(
            number := numbers.of(service.key),
            WAYPOINT if service.waypoint else 0,
            slots.get((number, port.service_port), 0),
        )
        for service in world.services.values()
        for vip in service.vips
        for port in service.ports
    }
