"""Verdicts written ahead say what the policies say, of every port; endpoints are those ztunnel would choose from."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambient.datapath import verdicts
from ambient.datapath.endpoints import counts, endpoints
from ambient.datapath.entries import LocalPod, rights
from ambient.datapath.layout import LAYOUT
from ambient.datapath.numbers import Numbers
from ambient.datapath.values import EndpointKey
from ambient.manifest.acceleration import ACCELERATION, Acceleration, parse, resolve
from ambient.manifest.mesh import STATIC_STRICT
from ambient.model.address import parse_ip
from ambient.model.identity import Identity
from ambient.model.policy import (
    Action,
    Allowed,
    Connection,
    Group,
    Match,
    MatchKind,
    Policy,
    Rule,
    Scope,
    StringMatch,
    evaluate,
)
from ambient.model.workload import (
    GatewayAddress,
    LoadBalancing,
    LoadBalancingMode,
    LoadBalancingScope,
    Port,
    Service,
    TunnelProtocol,
    Workload,
    WorkloadStatus,
)
from ambient.model.world import World

IDENTITIES = [Identity("cluster.local", ns, sa) for ns in ("shop", "bank") for sa in ("a", "b")]
PORTS = st.integers(1, 12)
NAMES = st.sampled_from(["shop", "bank", "cluster.local/ns/shop/sa/a", "cluster.local/ns/bank/sa/b", "s"])
STRINGS = st.builds(StringMatch, st.sampled_from(MatchKind), NAMES)


def few(elements: st.SearchStrategy) -> st.SearchStrategy:  # type: ignore[type-arg]
    return st.lists(elements, max_size=2).map(tuple)


MATCHES = st.builds(
    Match,
    namespaces=few(STRINGS),
    not_namespaces=few(STRINGS),
    principals=few(STRINGS),
    not_principals=few(STRINGS),
    destination_ports=few(PORTS),
    not_destination_ports=few(PORTS),
)
GROUPS = st.builds(Group, few(st.builds(Rule, few(MATCHES))))
POLICIES = st.lists(
    st.builds(
        Policy,
        name=st.sampled_from(["p", "q", "r"]),
        namespace=st.just("shop"),
        scope=st.just(Scope.NAMESPACE),
        action=st.sampled_from(Action),
        groups=few(GROUPS),
        dry_run=st.booleans(),
    ),
    max_size=4,
)


@given(POLICIES, st.sampled_from(IDENTITIES), st.one_of(st.integers(1, 14), st.just(65535)))
def test_what_the_hook_finds_is_what_the_policies_say(policies, identity, port):
    numbers, identities = Numbers(), {who: index for index, who in enumerate(IDENTITIES, 1)}
    table = verdicts.verdicts_for(policies, 7, 99, identities, numbers)
    found = verdicts.look_up(table, identities[identity], 7, port)
    address = parse_ip("10.0.0.1")
    decided = evaluate(Connection(identity, address, address, port), policies)
    assert found is not None and found.generation == 99
    assert bool(found.allow) == isinstance(decided, Allowed)
    assert numbers.names().get(found.policy) == decided.policy


@given(POLICIES)
def test_port_0_comes_last_and_goes_first(policies):
    keys = list(verdicts.verdicts_for(policies, 7, 99, {IDENTITIES[0]: 1}, Numbers()))
    assert [key.port for key in keys].index(0) == len(keys) - 1
    assert verdicts.remove_first(keys)[0].port == 0


def policy(match: Match, name: str = "p", **more: object) -> Policy:
    groups = (Group((Rule((match,)),)),)
    return Policy(name, "shop", Scope.NAMESPACE, Action.ALLOW, groups, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["source_ips", "not_source_ips", "destination_ips", "not_destination_ips"])
def test_what_depends_on_addresses_is_never_written_ahead(field):
    from ipaddress import ip_network

    match = Match(**{field: (ip_network("10.0.0.0/8"),)})  # type: ignore[arg-type]
    identities = {IDENTITIES[0]: 1}
    assert verdicts.verdicts_for([policy(match)], 7, 9, identities, Numbers()) == {}
    assert verdicts.verdicts_for([policy(match, dry_run=True)], 7, 9, identities, Numbers())


def test_too_many_ports_are_left_to_ztunnel():
    ports = tuple(range(1, verdicts.PORTS_MAX + 2))
    identities = {IDENTITIES[0]: 1}
    assert verdicts.verdicts_for([policy(Match(destination_ports=ports))], 7, 9, identities, Numbers()) == {}
    assert verdicts.verdicts_for([policy(Match(destination_ports=ports[:-1]))], 7, 9, identities, Numbers())


# --- rights

POD = LocalPod("c//Pod/shop/near", ("10.1.0.5",), 7, True, identity=IDENTITIES[0], acceleration=Acceleration.DIRECT)


def workload(name: str = "near", address: str = "10.1.0.5", node: str = "n1", **more: object) -> Workload:
    values: dict[str, object] = {"service_account": "a", "protocol": TunnelProtocol.HBONE, "node": node}
    return Workload(f"c//Pod/shop/{name}", name, "shop", (parse_ip(address),), **(values | more))  # type: ignore[arg-type]


def test_only_the_very_pod_that_the_world_knows_has_rights_to_grant():
    allow_any = LAYOUT["WORKLOAD_ALLOW_ANY"]
    assert rights(World.of([workload()]), [POD])[POD].flags & allow_any
    for other in (workload(service_account="b"), workload(address="10.1.0.6")):
        found = rights(World.of([other]), [POD])[POD]
        assert found.policies is None and not found.flags & allow_any
    assert rights(World(), [POD])[POD].policies is None


def test_strict_leaves_the_kernel_path_unless_it_means_off():
    world = World.of([workload()], policies=[policy(Match(destination_ports=(80,)), STATIC_STRICT)])
    assert rights(world, [POD])[POD].flags & LAYOUT["WORKLOAD_DIRECT"]
    assert rights(world, [POD], strict_means_off=True)[POD].flags & LAYOUT["WORKLOAD_OFF"]
    assert rights(World.of([workload()]), [POD], strict_means_off=True)[POD].flags & LAYOUT["WORKLOAD_DIRECT"]


# --- endpoints

KEY = "shop/web.shop.svc.cluster.local"
SERVES = ((KEY, (Port(80, 8080),)),)


def service(**more: object) -> Service:
    values: dict[str, object] = {"vips": (parse_ip("10.96.0.1"),), "ports": (Port(80, 8080),)}
    return Service("web", "shop", "web.shop.svc.cluster.local", **(values | more))  # type: ignore[arg-type]


def slots(world: World) -> dict[EndpointKey, tuple[str, int]]:
    found = endpoints(world, "n1", ["c//Pod/shop/near"], Numbers(), Numbers())
    return {key: (value.address4, value.port) for key, value in found.items()}


NEAR, FAR = workload(services=SERVES), workload("far", "10.2.0.5", "n2", services=SERVES)


def test_slots_are_all_healthy_endpoints_without_a_gap():
    found = slots(
        World.of(
            [NEAR, FAR, workload("sick", "10.2.0.6", status=WorkloadStatus.UNHEALTHY, services=SERVES)], [service()]
        )
    )
    assert sorted(found.values()) == [("10.1.0.5", 8080), ("10.2.0.5", 8080)]
    assert sorted(key.slot for key in found) == [0, 1]
    assert list(counts(found).values()) == [2]


def test_a_service_with_no_endpoint_here_is_ztunnels():
    assert slots(World.of([workload(), FAR], [service()])) == {}


def test_weights_are_repeated_slots():
    from dataclasses import replace

    found = slots(World.of([replace(NEAR, capacity=4), replace(FAR, capacity=6)], [service()]))
    assert sorted(found.values()) == [("10.1.0.5", 8080)] * 2 + [("10.2.0.5", 8080)] * 3
    assert slots(World.of([replace(NEAR, capacity=1), replace(FAR, capacity=5000)], [service()])) == {}


def test_the_nodes_preference_holds():
    local = LoadBalancing((LoadBalancingScope.NODE,), LoadBalancingMode.STRICT)
    assert list(slots(World.of([NEAR, FAR], [service(load_balancing=local)])).values()) == [("10.1.0.5", 8080)]
    passing = LoadBalancing(mode=LoadBalancingMode.PASSTHROUGH)
    assert slots(World.of([NEAR, FAR], [service(load_balancing=passing)])) == {}


def test_a_waypoint_or_no_virtual_address_leaves_no_slots():
    assert slots(World.of([NEAR], [service(waypoint=GatewayAddress("shop/w"))])) == {}
    assert slots(World.of([NEAR], [service(vips=())])) == {}


# --- the annotation


@pytest.mark.parametrize("word", ["auto", "redirect", "direct", "off"])
def test_a_pods_word_stands_before_its_namespaces(word):
    assert parse({ACCELERATION: word}, {ACCELERATION: "off"}) == (Acceleration(word), "")
    assert parse({}, {ACCELERATION: word}) == (Acceleration(word), "")
    assert parse({}, {}) == (Acceleration.AUTO, "")


def test_an_unknown_word_means_off_and_is_said():
    for pod, namespace in (({ACCELERATION: "fast"}, {}), ({}, {ACCELERATION: "Direct"})):
        wanted, problem = parse(pod, namespace)
        assert wanted is Acceleration.OFF and ACCELERATION in problem


def test_auto_is_what_the_kernel_can_do():
    assert resolve(Acceleration.AUTO, auto_redirect=True) is Acceleration.REDIRECT
    assert resolve(Acceleration.AUTO, auto_redirect=False) is Acceleration.DIRECT
    assert resolve(Acceleration.OFF, auto_redirect=True) is Acceleration.OFF
