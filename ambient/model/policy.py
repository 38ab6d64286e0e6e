"""L4 authorization policies and their evaluation, with Istio's exact semantics.

The nesting is Istio's wire form (istio.security.Authorization):

    a policy matches     if ANY of its groups matches    (no groups: never)
    a group matches      if ALL of its rules match       (no rules: always)
    a rule matches       if ANY of its matches matches   (no matches: always)
    a match matches      if ALL of its fields match; the values of one field are OR-ed, ``not_*`` negated
                         (no fields at all: never)

and the order of decisions is: any DENY that matches denies; else no ALLOW policy at all allows; else any
ALLOW that matches allows; else deny. ``dry_run`` policies take no part (their result is reported beside).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from ambient.model.address import IPAddress, IPNetwork, network_contains
from ambient.model.identity import Identity


class Scope(enum.Enum):
    GLOBAL = 0
    NAMESPACE = 1
    WORKLOAD_SELECTOR = 2


class Action(enum.Enum):
    ALLOW = 0
    DENY = 1


class MatchKind(enum.Enum):
    EXACT = "exact"
    PREFIX = "prefix"
    SUFFIX = "suffix"
    PRESENCE = "presence"


@dataclass(frozen=True, slots=True)
class StringMatch:
    """Istio's StringMatch. PRESENCE matches any value that is not empty."""

    kind: MatchKind
    value: str = ""

    def matches(self, actual: str) -> bool:
        match self.kind:
            case MatchKind.EXACT:
                return actual == self.value
            case MatchKind.PREFIX:
                return actual.startswith(self.value)
            case MatchKind.SUFFIX:
                return actual.endswith(self.value)
            case MatchKind.PRESENCE:
                return actual != ""


@dataclass(frozen=True, slots=True)
class ServiceAccountMatch:
    namespace: str
    service_account: str


@dataclass(frozen=True, slots=True)
class Match:
    """One conjunction of fields. An empty field says nothing; a match without any field never matches.

    A peer without an identity has the empty namespace and no principal: no principal match, not even
    PRESENCE, holds for it, so ``not_principals: presence`` is true of exactly such peers (that is STRICT).
    """

    namespaces: tuple[StringMatch, ...] = ()
    not_namespaces: tuple[StringMatch, ...] = ()
    principals: tuple[StringMatch, ...] = ()
    not_principals: tuple[StringMatch, ...] = ()
    source_ips: tuple[IPNetwork, ...] = ()
    not_source_ips: tuple[IPNetwork, ...] = ()
    destination_ips: tuple[IPNetwork, ...] = ()
    not_destination_ips: tuple[IPNetwork, ...] = ()
    destination_ports: tuple[int, ...] = ()
    not_destination_ports: tuple[int, ...] = ()
    service_accounts: tuple[ServiceAccountMatch, ...] = ()
    not_service_accounts: tuple[ServiceAccountMatch, ...] = ()

    def matches(self, connection: Connection) -> bool:
        if self == _NO_FIELDS:
            return False
        source = connection.source
        namespace = source.namespace if source else ""
        principal = source.principal if source else None

        def string(wanted: tuple[StringMatch, ...], unwanted: tuple[StringMatch, ...], actual: str | None) -> bool:
            def any_of(matches: tuple[StringMatch, ...]) -> bool:
                return actual is not None and any(m.matches(actual) for m in matches)

            return (not wanted or any_of(wanted)) and not any_of(unwanted)

        def ip(wanted: tuple[IPNetwork, ...], unwanted: tuple[IPNetwork, ...], actual: IPAddress) -> bool:
            return (not wanted or any(network_contains(n, actual) for n in wanted)) and not any(
                network_contains(n, actual) for n in unwanted
            )

        def account(wanted: tuple[ServiceAccountMatch, ...]) -> bool:
            return source is not None and any(
                a.namespace == source.namespace and a.service_account == source.service_account for a in wanted
            )

        port = connection.destination_port
        return (
            string(self.namespaces, self.not_namespaces, namespace)
            and string(self.principals, self.not_principals, principal)
            and ip(self.source_ips, self.not_source_ips, connection.source_ip)
            and ip(self.destination_ips, self.not_destination_ips, connection.destination_ip)
            and (not self.destination_ports or port in self.destination_ports)
            and port not in self.not_destination_ports
            and (not self.service_accounts or account(self.service_accounts))
            and not account(self.not_service_accounts)
        )


_NO_FIELDS = Match()


@dataclass(frozen=True, slots=True)
class Rule:
    """Matches OR-ed (Istio: Rules / Clause)."""

    matches: tuple[Match, ...] = ()

    def holds(self, connection: Connection) -> bool:
        return not self.matches or any(m.matches(connection) for m in self.matches)


@dataclass(frozen=True, slots=True)
class Group:
    """Rules AND-ed (Istio: Group / Rule)."""

    rules: tuple[Rule, ...] = ()

    def holds(self, connection: Connection) -> bool:
        return all(r.holds(connection) for r in self.rules)


@dataclass(frozen=True, slots=True)
class Policy:
    """An L4 policy (Istio Authorization). ``key`` is its resource name ``namespace/name``."""

    name: str
    namespace: str
    scope: Scope
    action: Action
    groups: tuple[Group, ...] = ()
    dry_run: bool = False

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    def matches(self, connection: Connection) -> bool:
        return any(g.holds(connection) for g in self.groups)


@dataclass(frozen=True, slots=True)
class Connection:
    """What a policy may look at. ``source`` is None for a peer that proved no identity (plaintext)."""

    source: Identity | None
    source_ip: IPAddress
    destination_ip: IPAddress
    destination_port: int


@dataclass(frozen=True, slots=True)
class Allowed:
    """``policy`` is the ALLOW policy that matched, None where no ALLOW policy exists."""

    policy: str | None


@dataclass(frozen=True, slots=True)
class Denied:
    """``policy`` is the DENY policy that matched, None where ALLOW policies exist and none matched."""

    policy: str | None


Verdict = Allowed | Denied


def evaluate(connection: Connection, policies: Iterable[Policy]) -> Verdict:
    """Decide by every policy in force for the destination (global, namespace and selected)."""
    in_force = [p for p in policies if not p.dry_run]
    for policy in in_force:
        if policy.action is Action.DENY and policy.matches(connection):
            return Denied(policy.key)
    allows = [p for p in in_force if p.action is Action.ALLOW]
    if not allows:
        return Allowed(None)
    for policy in allows:
        if policy.matches(connection):
            return Allowed(policy.key)
    return Denied(None)
