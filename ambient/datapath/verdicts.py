"""Verdicts written ahead: what policies say of every local source identity, local destination and port. Pure.

The kernel looks for the entry of the very port, then for that of port 0, which stands for all ports no policy mentions.
So a destination's ports each have an entry of their own, and port 0 is only ever written together with them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from ipaddress import IPv4Address
from typing import Final

from ambient.datapath.numbers import Numbers
from ambient.datapath.values import VerdictKey, VerdictValue
from ambient.manifest.mesh import PORT_LEVEL_PREFIX, STATIC_STRICT
from ambient.model.identity import Identity
from ambient.model.policy import Allowed, Connection, Policy, evaluate

PORTS_MAX: Final = 256
"""Ports that the policies of one destination may mention; with more of them ztunnel decides."""
_ANY: Final = IPv4Address(0)


def in_force(policies: Iterable[Policy]) -> tuple[Policy, ...]:
    return tuple(p for p in policies if not p.dry_run)


def looks_at_addresses(policies: Iterable[Policy]) -> bool:
    """Whether any of them has a clause on the IP address of either end: no verdict can be written ahead."""
    return any(
        match.source_ips or match.not_source_ips or match.destination_ips or match.not_destination_ips
        for policy in policies
        for group in policy.groups
        for rule in group.rules
        for match in rule.matches
    )


def is_strict(policies: Iterable[Policy]) -> bool:
    """Whether a PeerAuthentication demands mutual TLS of any port."""
    return any(p.name == STATIC_STRICT or p.name.startswith(PORT_LEVEL_PREFIX) for p in in_force(policies))


def ports_of(policies: Iterable[Policy]) -> frozenset[int]:
    """Every port that a policy mentions."""
    return frozenset(
        port
        for policy in policies
        for group in policy.groups
        for rule in group.rules
        for match in rule.matches
        for port in (*match.destination_ports, *match.not_destination_ports)
        if 0 < port <= 65535
    )


def verdicts_for(
    policies: Iterable[Policy],
    workload: int,
    generation: int,
    identities: Mapping[Identity, int],
    numbers: Numbers,
) -> dict[VerdictKey, VerdictValue]:
    """Entries for one destination, those of port 0 after all others. Empty where ztunnel has to decide.

    ``numbers`` are those of policies, by ``namespace/name``.
    """
    effective = in_force(policies)
    mentioned = ports_of(effective)
    if looks_at_addresses(effective) or len(mentioned) > PORTS_MAX:
        return {}
    other = next(port for port in range(1, 65536) if port not in mentioned)
    found: dict[VerdictKey, VerdictValue] = {}
    for port in (*sorted(mentioned), 0):
        for identity, number in identities.items():
            decided = evaluate(Connection(identity, _ANY, _ANY, port or other), effective)
            policy = numbers.of(decided.policy) if decided.policy else 0
            value = VerdictValue(generation, int(isinstance(decided, Allowed)), policy)
            found[VerdictKey(number, workload, port)] = value
    return found


def look_up(table: Mapping[VerdictKey, VerdictValue], identity: int, workload: int, port: int) -> VerdictValue | None:
    """What the connect hook finds."""
    own = table.get(VerdictKey(identity, workload, port))
    return own if own is not None else table.get(VerdictKey(identity, workload, 0))


def remove_first(keys: Collection[VerdictKey]) -> list[VerdictKey]:
    """In the order in which they may be deleted: port 0 before the others, which it must not stand in for."""
    return sorted(keys, key=lambda key: key.port != 0)
