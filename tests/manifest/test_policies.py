"""AuthorizationPolicy: what each becomes, by the decisions that follow from it."""

from __future__ import annotations

import copy
import ipaddress
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ambient.errors import ConfigFault
from ambient.manifest.kinds import AUTHORIZATION_POLICY
from ambient.manifest.mesh import Mesh
from ambient.manifest.objects import AuthorizationPolicy
from ambient.manifest.policies import Converted, closed, convert, ip_block, string_match
from ambient.model.identity import Identity
from ambient.model.policy import Action, Allowed, Connection, Denied, Group, MatchKind, Scope, StringMatch, evaluate

MESH = Mesh()
CART = Identity("cluster.local", "shop", "cart")
OTHER = Identity("cluster.local", "bank", "teller")


def policy(spec: Any, namespace: str = "shop", annotations: dict[str, str] | None = None) -> AuthorizationPolicy:
    if isinstance(spec, str):
        spec = yaml.safe_load(spec)
    meta = {"name": "p", "namespace": namespace, "annotations": annotations}
    return AUTHORIZATION_POLICY.convert({"metadata": meta, "spec": spec})


def connection(
    source: Identity | None = CART, ip: str = "10.1.0.4", to: str = "10.1.0.9", port: int = 8080
) -> Connection:
    return Connection(source, ipaddress.ip_address(ip), ipaddress.ip_address(to), port)


def matches(spec: Any, given_connection: Connection) -> bool:
    """Whether the converted policy's rules match, without anything left out."""
    converted = convert(policy(spec), MESH)
    assert converted.policy is not None and converted.problems == (), converted.problems
    return converted.policy.matches(given_connection)


def one_rule(text: str) -> dict[str, Any]:
    return {"rules": [yaml.safe_load(text)]}


PLAIN = connection(source=None)

TABLE: list[tuple[str, Connection, Connection]] = [
    # rule, a connection it matches, one it does not
    ("from: [{source: {principals: [cluster.local/ns/shop/sa/cart]}}]", connection(), connection(OTHER)),
    ("from: [{source: {principals: [cluster.local/ns/shop/*]}}]", connection(), connection(OTHER)),
    ("from: [{source: {principals: ['*/sa/cart']}}]", connection(), connection(OTHER)),
    ("from: [{source: {principals: ['*']}}]", connection(), PLAIN),
    ("from: [{source: {notPrincipals: ['*']}}]", PLAIN, connection()),
    ("from: [{source: {notPrincipals: ['*/sa/cart']}}]", connection(OTHER), connection()),
    ("from: [{source: {namespaces: [shop]}}]", connection(), connection(OTHER)),
    ("from: [{source: {namespaces: ['*']}}]", connection(), PLAIN),
    ("from: [{source: {notNamespaces: [shop]}}]", PLAIN, connection()),
    ("from: [{source: {ipBlocks: [10.1.0.0/24]}}]", connection(), connection(ip="10.1.1.4")),
    ("from: [{source: {ipBlocks: [10.1.0.4]}}]", connection(), connection(ip="10.1.0.5")),
    ("from: [{source: {ipBlocks: ['fd00::/8']}}]", connection(ip="fd00::1"), connection()),
    ("from: [{source: {notIpBlocks: [10.1.0.0/24]}}]", connection(ip="10.2.0.1"), connection()),
    ("from: [{source: {serviceAccounts: [cart]}}]", connection(), connection(OTHER)),
    ("from: [{source: {serviceAccounts: [bank/teller]}}]", connection(OTHER), connection()),
    ("from: [{source: {notServiceAccounts: [bank/teller]}}]", connection(), connection(OTHER)),
    # values of one field are alternatives, fields of one source must all hold, sources are alternatives
    ("from: [{source: {namespaces: [bank, shop]}}]", connection(), PLAIN),
    (
        "from: [{source: {namespaces: [shop], ipBlocks: [10.1.0.0/24]}}]",
        connection(),
        connection(ip="10.2.0.1"),
    ),
    ("from: [{source: {namespaces: [x]}}, {source: {namespaces: [shop]}}]", connection(), connection(OTHER)),
    ("to: [{operation: {ports: ['8080', '9090']}}]", connection(port=9090), connection(port=80)),
    ("to: [{operation: {notPorts: ['8080']}}]", connection(port=80), connection()),
    ("to: [{operation: {ports: ['1']}}, {operation: {ports: ['8080']}}]", connection(), connection(port=80)),
    # from, to and when must all hold
    (
        "{from: [{source: {namespaces: [shop]}}], to: [{operation: {ports: ['80']}}]}",
        connection(port=80),
        connection(OTHER, port=80),
    ),
    ("when: [{key: source.ip, values: [10.1.0.0/24]}]", connection(), connection(ip="10.2.0.1")),
    ("when: [{key: source.namespace, notValues: [shop]}]", connection(OTHER), connection()),
    ("when: [{key: source.principal, values: ['*/sa/cart']}]", connection(), connection(OTHER)),
    ("when: [{key: destination.ip, values: [10.1.0.9]}]", connection(), connection(to="10.1.0.8")),
    ("when: [{key: destination.port, values: ['8080'], notValues: ['80']}]", connection(), connection(port=80)),
    (
        "when: [{key: source.namespace, values: [shop]}, {key: destination.port, values: ['80']}]",
        connection(port=80),
        connection(),
    ),
]


@pytest.mark.parametrize(("rule", "hit", "miss"), TABLE)
def test_a_rule_matches_what_it_says_and_nothing_else(rule: str, hit: Connection, miss: Connection) -> None:
    assert matches(one_rule(rule), hit)
    assert not matches(one_rule(rule), miss)


def test_no_rules_match_nothing_and_an_empty_rule_matches_everything() -> None:
    for spec in ({}, {"rules": []}, {"rules": None}, None):
        assert not matches(spec, connection())
    for anything in (connection(), PLAIN):
        assert matches({"rules": [{}]}, anything)


@pytest.mark.parametrize(
    ("spec", "namespace", "scope", "selector"),
    [
        ({}, "shop", Scope.NAMESPACE, ()),
        ({"selector": {}}, "shop", Scope.NAMESPACE, ()),
        ({"selector": {"matchLabels": {"app": "x"}}}, "shop", Scope.WORKLOAD_SELECTOR, (("app", "x"),)),
        ({}, "istio-system", Scope.GLOBAL, ()),
        ({"selector": {"matchLabels": {"app": "x"}}}, "istio-system", Scope.WORKLOAD_SELECTOR, (("app", "x"),)),
    ],
)
def test_scope_follows_namespace_and_selector(spec: Any, namespace: str, scope: Scope, selector: Any) -> None:
    converted = convert(policy(spec, namespace), MESH)
    assert converted.policy is not None
    assert (converted.policy.scope, converted.selector) == (scope, selector)
    assert converted.policy.key == f"{namespace}/p"


def test_policies_for_waypoints_are_not_for_ztunnels() -> None:
    target = {"kind": "Gateway", "name": "waypoint"}
    assert convert(policy({"targetRefs": [target], "rules": [{}]}), MESH) == Converted(None)
    assert convert(policy({"targetRef": target}), MESH) == Converted(None)


@pytest.mark.parametrize("action", ["CUSTOM", "AUDIT"])
def test_other_actions_are_reported_and_not_enforced(action: str) -> None:
    converted = convert(policy({"action": action, "rules": [{}]}), MESH)
    assert converted.policy is None
    assert converted.problems[0].field == "spec.action" and action in converted.problems[0].rule


def test_dry_run_is_carried() -> None:
    dry = convert(policy({"rules": [{}]}, annotations={"istio.io/dry-run": "true"}), MESH).policy
    wet = convert(policy({"rules": [{}]}, annotations={"istio.io/dry-run": "false"}), MESH).policy
    assert dry is not None and dry.dry_run
    assert wet is not None and not wet.dry_run


# Parts ztunnel cannot judge: a rule with each, and the field that must be named.
UNSUPPORTED = [
    ("to: [{operation: {methods: [GET]}}]", "spec.rules[0].to[0].operation.methods"),
    ("to: [{operation: {ports: ['80'], paths: [/x]}}]", "spec.rules[0].to[0].operation.paths"),
    ("to: [{operation: {notHosts: [x]}}]", "spec.rules[0].to[0].operation.notHosts"),
    ("from: [{source: {requestPrincipals: [x]}}]", "spec.rules[0].from[0].source.requestPrincipals"),
    ("from: [{source: {namespaces: [a], notRemoteIpBlocks: [10.0.0.0/8]}}]", "spec.rules[0].from[0].source.notRemote"),
    ("when: [{key: 'request.headers[x]', values: [y]}]", "spec.rules[0].when[0].key"),
    ("when: [{key: source.ip}]", "spec.rules[0].when[0]"),
    ("when: [{values: [x]}]", "spec.rules[0].when[0].key"),
    ("when: [{key: [x], values: [x]}]", "spec.rules[0].when[0].key"),
    ("when: []", "spec.rules[0].when"),
    ("when: 5", "spec.rules[0].when"),
    ("from: [{source: {ipBlocks: [10.0.0.0/33]}}]", "spec.rules[0].from[0].source.ipBlocks[0]"),
    ("from: [{source: {ipBlocks: [10.0.0.0/8, nonsense]}}]", "spec.rules[0].from[0].source.ipBlocks[1]"),
    ("from: [{source: {namespaces: ['']}}]", "spec.rules[0].from[0].source.namespaces[0]"),
    ("from: [{source: {namespaces: [5]}}]", "spec.rules[0].from[0].source.namespaces[0]"),
    ("from: [{source: {namespaces: shop}}]", "spec.rules[0].from[0].source.namespaces"),
    ("from: [{source: {namespaces: []}}]", "spec.rules[0].from[0].source"),
    ("from: [{source: {serviceAccounts: [a/b/c]}}]", "spec.rules[0].from[0].source.serviceAccounts[0]"),
    ("from: [{source: {serviceAccounts: ['*']}}]", "spec.rules[0].from[0].source.serviceAccounts[0]"),
    ("from: [{source: {principles: [x]}}]", "spec.rules[0].from[0].source.principles"),
    ("from: [{source: {}}]", "spec.rules[0].from[0].source"),
    ("from: [{}]", "spec.rules[0].from[0].source"),
    ("from: []", "spec.rules[0].from"),
    ("from:", "spec.rules[0].from"),
    ("from: {source: {namespaces: [a]}}", "spec.rules[0].from"),
    ("form: [{source: {namespaces: [a]}}]", "spec.rules[0].form"),
    ("to: [{operation: {ports: ['0']}}]", "spec.rules[0].to[0].operation.ports[0]"),
    ("to: [{operation: {ports: ['65536']}}]", "spec.rules[0].to[0].operation.ports[0]"),
    ("to: [{operation: {ports: [80]}}]", "spec.rules[0].to[0].operation.ports[0]"),
    ("to: [{operation: {ports: [http]}}]", "spec.rules[0].to[0].operation.ports[0]"),
    ("null", "spec.rules[0]"),
    ("[a]", "spec.rules[0]"),
    ("text", "spec.rules[0]"),
]


@pytest.mark.parametrize(("rule", "field"), UNSUPPORTED)
def test_an_allow_rule_with_a_part_nobody_can_judge_matches_nothing_but_still_denies(rule: str, field: str) -> None:
    converted = convert(policy(one_rule(rule)), MESH)
    assert converted.policy is not None and converted.policy.groups == ()
    assert converted.problems[0].field.startswith(field), converted.problems
    assert converted.problems[0].where == "AuthorizationPolicy shop/p"
    for peer in (connection(), PLAIN):
        assert evaluate(peer, [converted.policy]) == Denied(None)


@pytest.mark.parametrize(("rule", "field"), UNSUPPORTED)
def test_a_deny_rule_with_such_a_part_is_reported_too(rule: str, field: str) -> None:
    converted = convert(policy(one_rule(rule) | {"action": "DENY"}), MESH)
    assert converted.policy is not None and converted.policy.action is Action.DENY
    assert converted.problems[0].field.startswith(field)


def test_other_allow_rules_of_the_policy_stay() -> None:
    rules = [yaml.safe_load(text) for text in (UNSUPPORTED[0][0], "from: [{source: {namespaces: [shop]}}]")]
    converted = convert(policy({"rules": rules}), MESH)
    assert converted.policy is not None
    assert evaluate(connection(), [converted.policy]) == Allowed("shop/p")
    assert evaluate(connection(OTHER), [converted.policy]) == Denied(None)


@pytest.mark.parametrize(
    ("rule", "denied", "passed"),
    [
        ("{from: [{source: {namespaces: [shop], requestPrincipals: [x]}}]}", connection(), connection(OTHER)),
        ("to: [{operation: {ports: ['80'], methods: [GET]}}]", connection(port=80), connection()),
        (
            "{from: [{source: {namespaces: [shop]}}], when: [{key: 'request.headers[x]', values: [y]}]}",
            connection(),
            connection(OTHER),
        ),
        # one operation without any L4 part: the whole "to" constrains nothing
        (
            "{from: [{source: {namespaces: [shop]}}], to: [{operation: {ports: ['80']}}, {operation: {paths: [/]}}]}",
            connection(port=8080),
            connection(OTHER, port=80),
        ),
        # an unreadable block must not narrow what is denied
        ("from: [{source: {namespaces: [shop], ipBlocks: [192.0.2.0/24, bad]}}]", connection(), connection(OTHER)),
        ("from: [{source: {namespaces: [shop], notIpBlocks: [10.0.0.0/8, bad]}}]", connection(), connection(OTHER)),
    ],
)
def test_a_deny_rule_keeps_its_l4_part(rule: str, denied: Connection, passed: Connection) -> None:
    converted = convert(policy(one_rule(rule) | {"action": "DENY"}), MESH)
    assert converted.policy is not None and converted.problems
    assert evaluate(denied, [converted.policy]) == Denied("shop/p")
    assert evaluate(passed, [converted.policy]) == Allowed(None)


@pytest.mark.parametrize("rule", ["to: [{operation: {methods: [GET]}}]", "from: [{source: {ipBlocks: [bad]}}]", "null"])
def test_a_deny_rule_of_which_nothing_remains_is_dropped(rule: str) -> None:
    converted = convert(policy(one_rule(rule) | {"action": "DENY"}), MESH)
    assert converted.policy is not None and converted.policy.groups == ()


@pytest.mark.parametrize(
    ("rule", "denied", "other"),
    [
        (
            "from: [{source: {principals: ['*/sa/cart']}}, {source: {requestPrincipals: ['*']}}]",
            connection(),
            connection(OTHER),
        ),
        ("from: [{source: {ipBlocks: [10.1.0.4, 10.1.0.0/33]}}]", connection(), connection(ip="10.1.0.5")),
        ("from: [{source: {notIpBlocks: [10.1.0.4, nonsense]}}]", connection(ip="10.1.0.5"), connection()),
        ("to: [{operation: {ports: ['8080', http]}}]", connection(), connection(port=8081)),
        ("to: [{operation: {ports: ['8080']}}, {operation: {methods: [GET]}}]", connection(), connection(port=8081)),
        ("when: [{key: source.ip, values: [10.1.0.4, nonsense]}]", connection(), connection(ip="10.1.0.5")),
        (
            "from: [{source: {namespaces: [shop]}}, {}]\nto: [{operation: {methods: [GET]}}]",
            connection(),
            connection(OTHER),
        ),
    ],
)
def test_a_deny_rule_denies_what_its_readable_alternatives_and_values_say(
    rule: str, denied: Connection, other: Connection
) -> None:
    converted = convert(policy(one_rule(rule) | {"action": "DENY"}), MESH)
    assert converted.policy is not None and converted.problems
    assert isinstance(evaluate(denied, [converted.policy]), Denied)
    assert isinstance(evaluate(other, [converted.policy]), Allowed)


@pytest.mark.parametrize(
    ("spec", "where"),
    [
        ({"action": "ALOW"}, "spec.action"),
        ({"action": 5}, "spec.action"),
        ({"action": ["ALLOW"]}, "spec.action"),
        ({"rulez": []}, "spec.rulez"),
        ({5: []}, "spec.5"),
        ({"rules": {}}, "spec.rules"),
        ({"rules": "x"}, "spec.rules"),
        ({"rules": [{}] * 513}, "spec.rules"),
        ({"selector": []}, "spec.selector"),
        ({"selector": {"matchExpressions": []}}, "spec.selector.matchExpressions"),
        ({"selector": {"matchLabels": {"a": 5}}}, r"spec.selector.matchLabels\[a\]"),
        ({"selector": {"matchLabels": {"a": "x*"}}}, r"spec.selector.matchLabels\[a\]"),
        ({"selector": {"matchLabels": []}}, "spec.selector.matchLabels"),
        ([], "spec"),
        ("x", "spec"),
    ],
)
def test_a_policy_that_cannot_be_judged_is_a_fault_and_stands_closed(spec: Any, where: str) -> None:
    item = AUTHORIZATION_POLICY.convert({"metadata": {"name": "p", "namespace": "shop"}, "spec": spec})
    with pytest.raises(ConfigFault, match=f"AuthorizationPolicy shop/p: {where}"):
        convert(item, MESH)
    instead = closed(item, MESH).policy
    assert instead is not None
    assert evaluate(connection(), [instead]) == Denied(None)


def test_closed_keeps_to_the_workloads_that_the_policy_selects() -> None:
    converted = closed(policy({"selector": {"matchLabels": {"app": "x"}}, "action": "ALOW"}), MESH)
    assert converted.selector == (("app", "x"),)
    assert converted.policy is not None and converted.policy.scope is Scope.WORKLOAD_SELECTOR


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("*", StringMatch(MatchKind.PRESENCE)),
        ("a*", StringMatch(MatchKind.PREFIX, "a")),
        ("*a", StringMatch(MatchKind.SUFFIX, "a")),
        ("a", StringMatch(MatchKind.EXACT, "a")),
        ("a*b", StringMatch(MatchKind.EXACT, "a*b")),
    ],
)
def test_stars_at_the_ends_are_wildcards(text: str, expected: StringMatch) -> None:
    assert string_match(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.1.2.3", "10.1.2.3/32"),
        ("10.1.2.3/8", "10.0.0.0/8"),
        ("fd00::1", "fd00::1/128"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("::/0", "::/0"),
        ("0.0.0.0/0", "0.0.0.0/0"),
    ],
)
def test_blocks_are_networks_with_mapped_ones_folded(text: str, expected: str) -> None:
    assert str(ip_block(text)) == expected


@pytest.mark.parametrize(
    "text", ["10.0.0.0/255.0.0.0", "10.0.0.0/0.0.0.255", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/8/8"]
)
def test_blocks_have_a_prefix_length_and_no_mask(text: str) -> None:
    with pytest.raises(ValueError):
        ip_block(text)


# -- properties

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
words = st.sampled_from(
    ["from", "to", "when", "source", "operation", "principals", "namespaces", "ipBlocks", "ports", "key", "values"]
)
nearly = st.recursive(
    json_values | st.sampled_from(["*", "80", "10.0.0.0/8", "source.ip", "shop"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=4),
    max_leaves=20,
)


@given(
    nearly | st.fixed_dictionaries({"rules": st.lists(nearly, max_size=3)}, optional={"action": nearly}),
    st.sampled_from([CART, OTHER, None]),
)
def test_garbage_is_a_fault_or_is_converted_without_opening_anything(spec: Any, source: Identity | None) -> None:
    item = AUTHORIZATION_POLICY.convert({"metadata": {"name": "p", "namespace": "shop"}, "spec": spec})
    try:
        converted = convert(item, MESH)
    except ConfigFault:
        return
    if converted.policy is None or converted.policy.action is not Action.ALLOW:
        return
    written = (spec or {}).get("rules") or []
    assert len(converted.policy.groups) <= len(written)
    if Group() in converted.policy.groups:
        assert {} in written  # only what says so matches everything


strings = st.lists(st.sampled_from(["*", "shop", "ba*", "*k", "bank"]), min_size=1, max_size=2)
principals = st.lists(st.sampled_from(["*", "*/sa/cart", "cluster.local/*", str(OTHER)[9:]]), min_size=1, max_size=2)
blocks = st.lists(st.sampled_from(["10.1.0.0/24", "10.0.0.0/8", "10.1.0.4", "fd00::/8"]), min_size=1, max_size=2)
ports = st.lists(st.sampled_from(["80", "8080"]), min_size=1, max_size=2)
sources = st.fixed_dictionaries(
    {},
    optional={
        "namespaces": strings,
        "notNamespaces": strings,
        "principals": principals,
        "notPrincipals": principals,
        "ipBlocks": blocks,
        "notIpBlocks": blocks,
    },
).filter(bool)
operations = st.fixed_dictionaries({}, optional={"ports": ports, "notPorts": ports}).filter(bool)
rules = st.fixed_dictionaries(
    {},
    optional={
        "from": st.lists(st.fixed_dictionaries({"source": sources}), min_size=1, max_size=2),
        "to": st.lists(st.fixed_dictionaries({"operation": operations}), min_size=1, max_size=2),
        "when": st.lists(
            st.fixed_dictionaries({"key": st.just("source.namespace"), "values": strings}), min_size=1, max_size=2
        ),
    },
)
connections = st.builds(
    connection,
    st.sampled_from([CART, OTHER, None]),
    st.sampled_from(["10.1.0.4", "10.2.0.1", "fd00::1", "192.0.2.1"]),
    st.just("10.1.0.9"),
    st.sampled_from([80, 8080, 443]),
)
spoilers = st.sampled_from(
    [
        ("from", "source", {"requestPrincipals": ["x"]}),
        ("from", "source", {"ipBlocks": ["10.0.0.0/8", "bad"]}),
        ("from", "source", {"unknown": 1}),
        ("to", "operation", {"methods": ["GET"]}),
        ("to", "operation", {"ports": ["bad"]}),
        ("when", "", {"key": "request.auth.claims[x]", "values": ["y"]}),
    ]
)


@given(rules, spoilers, connections)
def test_a_spoiled_rule_never_allows_more_nor_denies_less(
    rule: dict[str, Any], spoiler: tuple[str, str, dict[str, Any]], peer: Connection
) -> None:
    """The rule with one more constraint nobody can judge, against the rule without it."""
    part, inner, extra = spoiler
    spoiled = copy.deepcopy(rule)
    if part == "when":
        spoiled.setdefault("when", []).append(extra)
    else:
        entries = spoiled.setdefault(part, [{inner: {}}])
        for entry in entries:
            entry[inner] |= extra

    def outcome(which: dict[str, Any], action: str) -> bool:
        made = convert(policy({"action": action, "rules": [which]}), MESH).policy
        assert made is not None
        return made.matches(peer)

    assert not outcome(spoiled, "ALLOW")
    without = copy.deepcopy(rule)
    replaced = set(extra) & {"ipBlocks", "ports"}  # the unreadable value takes the field's place
    for entry in without.get(part, []) if part != "when" else []:
        for name in replaced:
            entry[inner].pop(name, None)
    if part in without and part != "when" and any(not entry[inner] for entry in without[part]):
        del without[part]
    if without:  # of something a DENY rule must still deny all that the readable part says
        assert outcome(spoiled, "DENY") == outcome(without, "DENY")
