"""Policy evaluation against Istio's semantics: a table of its rules, and properties over generated policies."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambient.model.address import parse_ip
from ambient.model.identity import Identity
from ambient.model.policy import (
    Action,
    Allowed,
    Connection,
    Denied,
    Group,
    Match,
    MatchKind,
    Policy,
    Rule,
    Scope,
    ServiceAccountMatch,
    StringMatch,
    evaluate,
)
from tests.support.worlds import policies as some_policies

WEB = Identity("cluster.local", "shop", "web")
ANYONE = (StringMatch(MatchKind.PRESENCE),)


def exact(value: str) -> tuple[StringMatch, ...]:
    return (StringMatch(MatchKind.EXACT, value),)


def prefix(value: str) -> tuple[StringMatch, ...]:
    return (StringMatch(MatchKind.PREFIX, value),)


def suffix(value: str) -> tuple[StringMatch, ...]:
    return (StringMatch(MatchKind.SUFFIX, value),)


def nets(*texts: str) -> tuple[Any, ...]:
    return tuple(ipaddress.ip_network(t) for t in texts)


def connection(
    source: Identity | None = WEB, source_ip: str = "10.0.0.1", destination_ip: str = "10.0.0.2", port: int = 8080
) -> Connection:
    return Connection(source, parse_ip(source_ip), parse_ip(destination_ip), port)


WEB_PRINCIPAL = "cluster.local/ns/shop/sa/web"
FIELDS: list[tuple[Match, Connection, bool]] = [
    # principals: compared without the scheme, exact, prefix, suffix, presence
    (Match(principals=exact(WEB_PRINCIPAL)), connection(), True),
    (Match(principals=exact(f"spiffe://{WEB_PRINCIPAL}")), connection(), False),
    (Match(principals=exact("cluster.local/ns/shop/sa/we")), connection(), False),
    (Match(principals=exact(WEB_PRINCIPAL.upper())), connection(), False),
    (Match(principals=prefix("cluster.local/ns/shop/")), connection(), True),
    (Match(principals=prefix("other/ns/shop/")), connection(), False),
    (Match(principals=suffix("/sa/web")), connection(), True),
    (Match(principals=suffix("/sa/we")), connection(), False),
    (Match(principals=ANYONE), connection(), True),
    (Match(principals=ANYONE), connection(None), False),
    (Match(principals=exact("")), connection(None), False),
    (Match(principals=prefix("")), connection(None), False),
    (Match(principals=exact("nobody") + exact(WEB_PRINCIPAL)), connection(), True),
    (Match(not_principals=exact(WEB_PRINCIPAL)), connection(), False),
    (Match(not_principals=exact("nobody")), connection(), True),
    (Match(not_principals=exact(WEB_PRINCIPAL)), connection(None), True),
    (Match(not_principals=ANYONE), connection(None), True),  # this is STRICT
    (Match(not_principals=ANYONE), connection(), False),
    # namespaces: of the proved identity
    (Match(namespaces=exact("shop")), connection(), True),
    (Match(namespaces=exact("away")), connection(), False),
    (Match(namespaces=exact("shop")), connection(None), False),
    (Match(namespaces=ANYONE), connection(), True),
    (Match(namespaces=ANYONE), connection(None), False),
    (Match(namespaces=prefix("sh")), connection(), True),
    (Match(namespaces=suffix("op")), connection(), True),
    (Match(not_namespaces=exact("shop")), connection(), False),
    (Match(not_namespaces=exact("shop")), connection(None), True),
    (Match(not_namespaces=exact("away")), connection(), True),
    # service accounts
    (Match(service_accounts=(ServiceAccountMatch("shop", "web"),)), connection(), True),
    (Match(service_accounts=(ServiceAccountMatch("away", "web"),)), connection(), False),
    (Match(service_accounts=(ServiceAccountMatch("shop", "eve"),)), connection(), False),
    (Match(service_accounts=(ServiceAccountMatch("shop", "web"),)), connection(None), False),
    (Match(not_service_accounts=(ServiceAccountMatch("shop", "web"),)), connection(), False),
    (Match(not_service_accounts=(ServiceAccountMatch("shop", "web"),)), connection(None), True),
    (Match(not_service_accounts=(ServiceAccountMatch("shop", "eve"),)), connection(), True),
    # addresses
    (Match(source_ips=nets("10.0.0.0/24")), connection(), True),
    (Match(source_ips=nets("10.0.0.1/32")), connection(), True),
    (Match(source_ips=nets("10.0.1.0/24")), connection(), False),
    (Match(source_ips=nets("10.0.1.0/24", "10.0.0.0/24")), connection(), True),
    (Match(source_ips=nets("::/0")), connection(), False),
    (Match(source_ips=nets("0.0.0.0/0")), connection(source_ip="fd00::1"), False),
    (Match(source_ips=nets("fd00::/8")), connection(source_ip="fd00::1"), True),
    (Match(source_ips=nets("10.0.0.0/24")), connection(source_ip="::ffff:10.0.0.1"), True),
    (Match(not_source_ips=nets("10.0.0.0/24")), connection(), False),
    (Match(not_source_ips=nets("10.0.1.0/24")), connection(), True),
    (Match(destination_ips=nets("10.0.0.2/32")), connection(), True),
    (Match(destination_ips=nets("10.0.0.3/32")), connection(), False),
    (Match(not_destination_ips=nets("10.0.0.2/32")), connection(), False),
    (Match(not_destination_ips=nets("10.0.0.3/32")), connection(), True),
    # ports: of the workload, not of the service
    (Match(destination_ports=(8080,)), connection(), True),
    (Match(destination_ports=(80,)), connection(), False),
    (Match(destination_ports=(80, 8080)), connection(), True),
    (Match(not_destination_ports=(8080,)), connection(), False),
    (Match(not_destination_ports=(80,)), connection(), True),
    # fields of one match are AND-ed
    (Match(principals=exact(WEB_PRINCIPAL), destination_ports=(8080,)), connection(), True),
    (Match(principals=exact(WEB_PRINCIPAL), destination_ports=(80,)), connection(), False),
    (Match(principals=ANYONE, not_principals=exact(WEB_PRINCIPAL)), connection(), False),
    # a match that says nothing never matches
    (Match(), connection(), False),
]


@pytest.mark.parametrize(("match", "to", "wanted"), FIELDS)
def test_each_field_of_a_match_means_what_it_means_in_istio(match: Match, to: Connection, wanted: bool) -> None:
    assert match.matches(to) is wanted
    deny = Policy("p", "shop", Scope.NAMESPACE, Action.DENY, (Group((Rule((match,)),)),))
    assert evaluate(to, [deny]) == (Denied("shop/p") if wanted else Allowed(None))


YES, NO = Match(destination_ports=(8080,)), Match(destination_ports=(1,))
NESTING = [
    ((), False),  # no groups never match: an ALLOW policy with empty rules allows nobody
    ((Group(),), True),  # a group with no rules matches everybody
    ((Group((Rule(),)),), True),  # a rule with no matches holds
    ((Group((Rule((YES,)),)),), True),
    ((Group((Rule((NO,)),)),), False),
    ((Group((Rule((NO, YES)),)),), True),  # matches OR-ed
    ((Group((Rule((YES,)), Rule((NO,)))),), False),  # rules AND-ed
    ((Group((Rule((YES,)), Rule((NO, YES)))),), True),
    ((Group((Rule((NO,)),)), Group((Rule((YES,)),))), True),  # groups OR-ed
    ((Group((Rule((NO,)),)), Group((Rule((NO,)),))), False),
]


@pytest.mark.parametrize(("groups", "wanted"), NESTING)
def test_groups_are_ored_rules_anded_and_matches_ored(groups: tuple[Group, ...], wanted: bool) -> None:
    assert Policy("p", "shop", Scope.GLOBAL, Action.ALLOW, groups).matches(connection()) is wanted


def a(action: Action, match: Match, name: str = "", dry_run: bool = False) -> Policy:
    return Policy(name or action.name.lower(), "shop", Scope.NAMESPACE, action, (Group((Rule((match,)),)),), dry_run)


ALLOW_YES, ALLOW_NO = a(Action.ALLOW, YES, "allow-yes"), a(Action.ALLOW, NO, "allow-no")
DENY_YES, DENY_NO = a(Action.DENY, YES, "deny-yes"), a(Action.DENY, NO, "deny-no")
ORDER = [
    ((), Allowed(None)),
    ((DENY_NO,), Allowed(None)),
    ((DENY_YES,), Denied("shop/deny-yes")),
    ((ALLOW_YES,), Allowed("shop/allow-yes")),
    ((ALLOW_NO,), Denied(None)),
    ((ALLOW_NO, ALLOW_YES), Allowed("shop/allow-yes")),
    ((ALLOW_YES, DENY_YES), Denied("shop/deny-yes")),
    ((DENY_YES, ALLOW_YES), Denied("shop/deny-yes")),
    ((DENY_NO, ALLOW_NO), Denied(None)),
    ((DENY_NO, ALLOW_YES), Allowed("shop/allow-yes")),
    ((a(Action.DENY, YES, "tried", dry_run=True),), Allowed(None)),
    ((a(Action.ALLOW, NO, "tried", dry_run=True),), Allowed(None)),
    ((a(Action.ALLOW, YES, "tried", dry_run=True), ALLOW_NO), Denied(None)),
    ((Policy("nothing", "shop", Scope.NAMESPACE, Action.ALLOW),), Denied(None)),
    ((Policy("nothing", "shop", Scope.NAMESPACE, Action.DENY),), Allowed(None)),
    ((Policy("all", "shop", Scope.NAMESPACE, Action.ALLOW, (Group(),)),), Allowed("shop/all")),
    ((Policy("all", "shop", Scope.NAMESPACE, Action.DENY, (Group(),)), ALLOW_YES), Denied("shop/all")),
]


@pytest.mark.parametrize(("policies", "wanted"), ORDER)
def test_denials_go_first_then_the_want_of_any_allow_then_allows(
    policies: tuple[Policy, ...], wanted: Allowed | Denied
) -> None:
    assert evaluate(connection(), policies) == wanted


identities = st.one_of(
    st.none(),
    st.builds(
        Identity, st.sampled_from(("cluster.local", "other")), st.sampled_from(("a", "b")), st.sampled_from(("x", "y"))
    ),
)
connections = st.builds(
    Connection,
    identities,
    st.ip_addresses(),
    st.ip_addresses(),
    st.integers(1, 65535),
)
policy_lists = st.lists(some_policies, max_size=6)


@given(connections, policy_lists)
def test_evaluation_is_the_four_rules_whatever_the_policies(to: Connection, policies: list[Policy]) -> None:
    """An independent statement: sets instead of the order of a loop."""
    live = [p for p in policies if not p.dry_run]
    denying = {p.key for p in live if p.action is Action.DENY and p.matches(to)}
    allowing = {p.key for p in live if p.action is Action.ALLOW and p.matches(to)}
    verdict = evaluate(to, policies)
    if denying:
        assert isinstance(verdict, Denied) and verdict.policy in denying
    elif allowing:
        assert isinstance(verdict, Allowed) and verdict.policy in allowing
    elif any(p.action is Action.ALLOW for p in live):
        assert verdict == Denied(None)
    else:
        assert verdict == Allowed(None)


@given(connections, policy_lists, st.randoms())
def test_the_order_of_policies_decides_nothing(to: Connection, policies: list[Policy], random: Any) -> None:
    shuffled = list(policies)
    random.shuffle(shuffled)
    assert isinstance(evaluate(to, policies), Allowed) == isinstance(evaluate(to, shuffled), Allowed)


@given(connections, policy_lists, some_policies)
def test_another_denial_never_lets_anybody_in(to: Connection, policies: list[Policy], more: Policy) -> None:
    deny = Policy("more", more.namespace, more.scope, Action.DENY, more.groups)
    if isinstance(evaluate(to, policies), Denied):
        assert isinstance(evaluate(to, [*policies, deny]), Denied)


@given(connections, st.sampled_from(("namespaces", "principals")), st.sampled_from(MatchKind), st.text(max_size=4))
def test_a_negated_field_is_the_opposite_of_the_field(to: Connection, field: str, kind: MatchKind, text: str) -> None:
    """For a peer with an identity; without one neither a namespace nor a principal can be told from none."""
    values = (StringMatch(kind, text),)
    if to.source is not None:
        assert Match(**{field: values}).matches(to) != Match(**{f"not_{field}": values}).matches(to)
