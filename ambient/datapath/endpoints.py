"""Endpoints of services in the kernel: slots in this node's order of preference. Pure.

Only for service ports that have an endpoint on this node: a connection to any other goes to ztunnel anyway, which
chooses as well as the kernel would.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Final

from ambient.datapath.layout import LAYOUT
from ambient.datapath.numbers import Numbers
from ambient.datapath.values import EndpointKey, EndpointValue
from ambient.model.address import fold
from ambient.model.balancing import Here, prefer
from ambient.model.workload import LoadBalancingMode, Service, Workload
from ambient.model.world import World
from ambient.ports import GUARDED

SLOTS_MAX: Final = LAYOUT["SLOTS_MAX"]


def endpoints(
    world: World, node: str, local: Collection[str], workloads: Numbers, services: Numbers
) -> dict[EndpointKey, EndpointValue]:
    """Slots of all services with an endpoint among ``local`` (uids of this node's pods), from 0 without a gap."""
    found: dict[EndpointKey, EndpointValue] = {}
    keys = {key for uid in local if (w := world.workloads.get(uid)) for key, _ in w.services}
    known = [w for uid in sorted(local) if (w := world.workloads.get(uid)) is not None]
    here = Here(node, known[0] if known else None)
    for service in (world.services[key] for key in sorted(keys) if key in world.services):
        if not service.vips or service.waypoint or service.load_balancing.mode is LoadBalancingMode.PASSTHROUGH:
            continue
        number = services.of(service.key)
        for port in {p.service_port for p in service.ports}:
            for slot, value in enumerate(_slots(world, here, service, port, set(local), workloads)):
                found[EndpointKey(number, port, slot)] = value
    return found


def _slots(
    world: World, here: Here, service: Service, port: int, local: set[str], numbers: Numbers
) -> list[EndpointValue]:
    """As ztunnel's route has them; empty where ztunnel shall choose."""
    usable = [e for e in world.endpoints(service, port) if e.workload.addresses]
    preferred = set(prefer(here, (e.workload for e in usable), service.load_balancing))
    chosen: list[tuple[EndpointValue, int]] = []
    for endpoint in usable:
        workload = endpoint.workload
        target = endpoint.port.target_port or port
        if workload.uid not in preferred or workload.capacity <= 0 or (target in GUARDED and workload.enrolled):
            continue
        four, six = _address(workload, 4), _address(workload, 6)
        chosen.append((EndpointValue(four, six, numbers.of(workload.uid), target), workload.capacity))
    if not any(e.workload.uid in local and e.workload.uid in preferred for e in usable):
        return []
    common = math.gcd(*(weight for _, weight in chosen)) if chosen else 1
    if sum(weight // common for _, weight in chosen) > SLOTS_MAX:
        return []
    return [value for value, weight in chosen for _ in range(weight // common)]


def _address(workload: Workload, version: int) -> str:
    """The first of that family; empty if there is none."""
    return next((str(fold(a)) for a in workload.addresses if fold(a).version == version), "")


def counts(slots: Collection[EndpointKey]) -> dict[tuple[int, int], int]:
    """Service number and port -> slots, for the value in `services`."""
    found: dict[tuple[int, int], int] = {}
    for key in slots:
        found[key.service, key.port] = found.get((key.service, key.port), 0) + 1
    return found
