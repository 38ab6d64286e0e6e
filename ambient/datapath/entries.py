"""From what is known to what the kernel shall hold: the entries of `workloads` and `services`.

The addresses of this node's pods come from the agent (`LocalPod`) and from nowhere else: discovery lags
behind, and an address that was given to another pod must not name its former owner for a moment.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ambient.datapath.layout import LAYOUT
from ambient.datapath.numbers import Numbers
from ambient.datapath.values import ServiceKey, ServiceValue, WorkloadValue
from ambient.model.policy import Scope
from ambient.model.workload import Workload
from ambient.model.world import World

ENROLLED = LAYOUT["WORKLOAD_ENROLLED"]
LOCAL = LAYOUT["WORKLOAD_LOCAL"]
WAYPOINT = LAYOUT["WORKLOAD_WAYPOINT"]
ALLOW_ANY = LAYOUT["WORKLOAD_ALLOW_ANY"]
OPEN = LAYOUT["WORKLOAD_OPEN"]
BYPASS = LAYOUT["WORKLOAD_BYPASS"]


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


def local_workloads(world: World, pods: Iterable[LocalPod], numbers: Numbers) -> dict[str, WorkloadValue]:
    """Address -> entry of this node's pods; of two that claim an address the one that came later has it."""
    policies = _Policies(world)
    found: dict[str, WorkloadValue] = {}
    for pod in sorted(pods, key=lambda p: p.generation):
        known = world.workloads.get(pod.workload_uid)
        flags = LOCAL | (_flags(known, policies) if known else 0)
        if pod.enrolled:
            flags |= ENROLLED | (OPEN if pod.open else 0) | (BYPASS if pod.bypass else 0)
        for address in pod.addresses:
            found[address] = WorkloadValue(numbers.of(pod.workload_uid), flags, pod.generation)
    return found


def services(world: World, numbers: Numbers) -> dict[ServiceKey, ServiceValue]:
    """VIP and port -> entry, of every service."""
    return {
        ServiceKey(str(vip), port.service_port): ServiceValue(
            numbers.of(service.key), WAYPOINT if service.waypoint else 0
        )
        for service in world.services.values()
        for vip in service.vips
        for port in service.ports
    }
