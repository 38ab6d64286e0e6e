"""Policies <-> Authorization resources. See `ambient.xds.resources` for the rules of reading and writing."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.message import DecodeError

from ambient.errors import PeerFault
from ambient.model.address import IPNetwork
from ambient.model.policy import (
    Action,
    Group,
    Match,
    MatchKind,
    Policy,
    Rule,
    Scope,
    ServiceAccountMatch,
    StringMatch,
)
from ambient.proto import authorization_pb2
from ambient.xds.resources import (
    AUTHORIZATION_TYPE,
    Resource,
    fault,
    read_enum,
    read_network,
    read_port,
    seal,
)

_STRINGS = ("namespaces", "not_namespaces", "principals", "not_principals")
_NETWORKS = ("source_ips", "not_source_ips", "destination_ips", "not_destination_ips")
_PORTS = ("destination_ports", "not_destination_ports")
_ACCOUNTS = ("service_accounts", "not_service_accounts")


def encode_policy(policy: Policy) -> Resource:
    message = authorization_pb2.Authorization(
        name=policy.name,
        namespace=policy.namespace,
        scope=policy.scope.value,  # type: ignore[arg-type]  # an int is what the wire wants
        action=policy.action.value,  # type: ignore[arg-type]
        dry_run=policy.dry_run,
    )
    for group in policy.groups:
        out = message.groups.add()
        for rule in group.rules:
            matches = out.rules.add().matches
            for match in rule.matches:
                _put_match(matches.add(), match)
    return seal(AUTHORIZATION_TYPE, policy.key, message.SerializeToString(deterministic=True))


def _put_match(out: authorization_pb2.Match, match: Match) -> None:
    for field in _STRINGS:
        for string in getattr(match, field):
            target = getattr(out, field).add()
            if string.kind is MatchKind.PRESENCE:
                target.presence.SetInParent()
            else:
                setattr(target, string.kind.value, string.value)
    for field in _NETWORKS:
        for network in getattr(match, field):
            getattr(out, field).add(address=network.network_address.packed, length=network.prefixlen)
    for field in _PORTS:
        getattr(out, field).extend(getattr(match, field))
    for field in _ACCOUNTS:
        for account in getattr(match, field):
            getattr(out, field).add(namespace=account.namespace, serviceAccount=account.service_account)


def decode_policy(name: str, body: bytes) -> Policy:
    """Read an Authorization. Raises PeerFault naming the resource and the field."""
    message = _parse(name, body)
    if f"{message.namespace}/{message.name}" != name or not message.name:
        raise fault(name, "name", f"{message.namespace[:200]}/{message.name[:200]} is not the resource's name")
    return Policy(
        name=message.name,
        namespace=message.namespace,
        scope=read_enum(name, "scope", Scope, message.scope),
        action=read_enum(name, "action", Action, message.action),
        groups=tuple(
            Group(
                tuple(
                    Rule(
                        tuple(
                            _read_match(name, f"groups[{g}].rules[{r}].matches[{m}]", match)
                            for m, match in enumerate(rule.matches)
                        )
                    )
                    for r, rule in enumerate(group.rules)
                )
            )
            for g, group in enumerate(message.groups)
        ),
        dry_run=message.dry_run,
    )


def stand_in(name: str, body: bytes) -> Policy | None:
    """What serves in place of a policy that cannot be read and of which no good version is known.

    Leaving it out would let in whom it denies, so an ALLOW becomes one that never matches and anything else
    denies everyone, in the scope it has if that much is readable, else where workloads list it. A policy
    that only reports (dry_run) needs none, nor does one whose name no workload can list: None.
    """
    namespace, _, short = name.partition("/")
    if not short:
        return None
    try:
        message = _parse(name, body)
        scope = read_enum(name, "scope", Scope, message.scope)
        action = read_enum(name, "action", Action, message.action)
    except PeerFault:
        return Policy(short, namespace, Scope.WORKLOAD_SELECTOR, Action.DENY, (Group(),))
    if message.dry_run:
        return None
    return Policy(short, namespace, scope, action, () if action is Action.ALLOW else (Group(),))


def _parse(name: str, body: bytes) -> authorization_pb2.Authorization:
    message = authorization_pb2.Authorization()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise fault(name, "", f"not an istio.security.Authorization: {error}") from None
    return message


def _read_match(name: str, where: str, message: authorization_pb2.Match) -> Match:
    def strings(field: str) -> tuple[StringMatch, ...]:
        return tuple(_read_string(name, f"{where}.{field}", string) for string in getattr(message, field))

    def networks(field: str) -> tuple[IPNetwork, ...]:
        addresses: Iterable[authorization_pb2.Address] = getattr(message, field)
        return tuple(read_network(name, f"{where}.{field}", a.address, a.length) for a in addresses)

    def ports(field: str) -> tuple[int, ...]:
        return tuple(read_port(name, f"{where}.{field}", port) for port in getattr(message, field))

    def accounts(field: str) -> tuple[ServiceAccountMatch, ...]:
        return tuple(ServiceAccountMatch(a.namespace, a.serviceAccount) for a in getattr(message, field))

    return Match(
        namespaces=strings("namespaces"),
        not_namespaces=strings("not_namespaces"),
        principals=strings("principals"),
        not_principals=strings("not_principals"),
        source_ips=networks("source_ips"),
        not_source_ips=networks("not_source_ips"),
        destination_ips=networks("destination_ips"),
        not_destination_ips=networks("not_destination_ips"),
        destination_ports=ports("destination_ports"),
        not_destination_ports=ports("not_destination_ports"),
        service_accounts=accounts("service_accounts"),
        not_service_accounts=accounts("not_service_accounts"),
    )


def _read_string(name: str, where: str, message: authorization_pb2.StringMatch) -> StringMatch:
    match message.WhichOneof("match_type"):
        case "exact":
            return StringMatch(MatchKind.EXACT, message.exact)
        case "prefix":
            return StringMatch(MatchKind.PREFIX, message.prefix)
        case "suffix":
            return StringMatch(MatchKind.SUFFIX, message.suffix)
        case "presence":
            return StringMatch(MatchKind.PRESENCE)
        case _:
            raise fault(name, where, "says neither exact, prefix, suffix nor presence")
