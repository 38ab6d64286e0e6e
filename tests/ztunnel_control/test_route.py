"""Where captured connections go: each way a connection can pass, and each way it is refused."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest

from ambient.model.workload import (
    GatewayAddress,
    LoadBalancing,
    LoadBalancingMode,
    LoadBalancingScope,
    Locality,
    Port,
    WorkloadStatus,
    WorkloadType,
)
from ambient.model.world import World
from tests.support.shop import NODE, pod, serves, service, spiffe, workload
from ztunnel.core.local import Local
from ztunnel.core.messages import AskRoute, Hop, Route
from ztunnel.core.route import decide_route

WEB = pod("web-1", "10.0.0.1", "fd00::1")
VIP, VIP6 = "10.96.0.10", "fd96::10"
LOCAL = Local.of(NODE, [WEB])


def world(*workloads: Any, services: tuple[Any, ...] = ()) -> World:
    return World.of([workload("web-1", "10.0.0.1", "fd00::1"), *workloads], services)


def route(known: World | None, ip: str, port: int, *, local: Local = LOCAL, source: str = "uid-web-1") -> Route:
    return decide_route(known, local, AskRoute(source=source, ip=ip, port=port), 7)


def test_a_pod_address_of_the_mesh_is_reached_by_a_tunnel_to_that_pod() -> None:
    answer = route(world(workload("cart-1", "10.0.1.1")), "10.0.1.1", 8080)
    assert answer.kind == "hbone" and answer.identity == spiffe("web") and answer.generation == 7
    assert answer.hops == (
        Hop(
            ip="10.0.1.1",
            port=15008,
            authority="10.0.1.1:8080",
            identities=(spiffe("cart"),),
            destination="Kubernetes//Pod/shop/cart-1",
            endpoint="10.0.1.1:8080",
        ),
    )


def test_an_ipv6_authority_is_in_brackets() -> None:
    assert route(world(workload("cart-1", "fd00::9")), "fd00::9", 80).hops[0].authority == "[fd00::9]:80"


def test_a_pod_outside_the_mesh_is_reached_in_plaintext() -> None:
    answer = route(world(workload("cart-1", "10.0.1.1", enrolled=False)), "10.0.1.1", 8080)
    assert answer.kind == "tcp" and answer.hops[0].authority == "" and answer.hops[0].port == 8080
    assert answer.baggage == ""


def test_an_unknown_address_passes_to_where_the_application_wanted() -> None:
    answer = route(world(), "192.0.2.9", 443)
    assert (answer.kind, answer.hops) == ("tcp", (Hop(ip="192.0.2.9", port=443, endpoint="192.0.2.9:443"),))


def test_a_mapped_address_is_the_ipv4_address() -> None:
    answer = route(world(workload("cart-1", "10.0.1.1")), "::ffff:10.0.1.1", 80)
    assert answer.kind == "hbone" and answer.ip == "::ffff:10.0.1.1", "the key of the answer is that of the question"


def test_a_service_goes_to_its_healthy_endpoints_at_the_target_port_weighted_by_capacity() -> None:
    known = world(
        workload("cart-1", "10.0.1.1", services=serves("cart", Port(80, 8081)), capacity=3),
        workload("cart-2", "10.0.1.2", services=serves("cart", Port(80, 0))),
        workload("cart-3", "10.0.1.3", services=serves("cart"), status=WorkloadStatus.UNHEALTHY),
        workload("cart-4", "10.0.1.4", services=serves("cart"), capacity=0),
        services=(service("cart", VIP),),
    )
    answer = route(known, VIP, 80)
    assert [(h.endpoint, h.weight) for h in answer.hops] == [("10.0.1.1:8081", 3), ("10.0.1.2:80", 1)]
    assert answer.service == "shop/cart.shop.svc.cluster.local"


def test_a_service_may_ask_for_its_unready_endpoints_too() -> None:
    known = world(
        workload("cart-3", "10.0.1.3", services=serves("cart"), status=WorkloadStatus.UNHEALTHY),
        services=(service("cart", VIP, load_balancing=LoadBalancing(allow_unhealthy=True)),),
    )
    assert route(known, VIP, 80).kind == "hbone"


def test_while_a_service_is_being_enrolled_each_endpoint_is_reached_in_its_own_way() -> None:
    known = world(
        workload("cart-1", "10.0.1.1", services=serves("cart")),
        workload("cart-2", "10.0.1.2", services=serves("cart"), enrolled=False),
        services=(service("cart", VIP),),
    )
    answer = route(known, VIP, 80)
    assert answer.kind == "hbone"
    assert [(h.port, h.authority, h.identities) for h in answer.hops] == [
        (15008, "10.0.1.1:8080", (spiffe("cart"),)),
        (8080, "", ()),
    ]


def test_a_service_may_vouch_for_other_identities() -> None:
    known = world(
        workload("cart-1", "10.0.1.1", services=serves("cart")),
        services=(service("cart", VIP, subject_alt_names=(spiffe("old"), spiffe("cart"))),),
    )
    assert route(known, VIP, 80).hops[0].identities == (spiffe("cart"), spiffe("old"))


def test_an_endpoint_is_reached_by_the_family_that_was_asked_for() -> None:
    known = world(
        workload("cart-1", "10.0.1.1", "fd00::9", services=serves("cart")),
        services=(service("cart", VIP, VIP6),),
    )
    assert route(known, VIP, 80).hops[0].ip == "10.0.1.1"
    assert route(known, VIP6, 80).hops[0].ip == "fd00::9"


def test_host_network_endpoints_are_reached_in_plaintext() -> None:
    known = world(
        workload("cart-1", "172.18.0.2", services=serves("cart"), enrolled=False, host_network=True),
        services=(service("cart", VIP),),
    )
    assert route(known, VIP, 80).hops[0].endpoint == "172.18.0.2:8080"


def test_a_workload_with_a_tunnel_of_its_own_is_reached_by_it() -> None:
    known = world(workload("cart-1", "10.0.1.1", enrolled=False, native_tunnel=True))
    assert route(known, "10.0.1.1", 80).kind == "hbone"


CART = workload("cart-1", "10.0.1.1", services=serves("cart"))
WAYPOINT = GatewayAddress("shop/waypoint.shop.svc.cluster.local")
REFUSED = [
    ("not_synced", None, "10.0.1.1", 80),
    ("no_port", world(CART, services=(service("cart", VIP),)), VIP, 81),
    ("no_endpoint", world(services=(service("cart", VIP),)), VIP, 80),
    (
        "no_endpoint",
        world(
            workload("cart-1", "10.0.1.1", services=serves("cart"), status=WorkloadStatus.UNHEALTHY),
            services=(service("cart", VIP),),
        ),
        VIP,
        80,
    ),
    ("recursion", world(CART), "10.0.1.1", 15008),
    ("recursion", world(), "10.0.0.1", 15001),
    ("recursion", world(), "127.0.0.1", 15006),
    ("recursion", world(services=(service("cart", VIP),)), VIP, 15008),
    (
        "no_endpoint",  # a service whose target is the mesh itself
        world(
            workload("cart-1", "10.0.1.1", services=serves("cart", Port(80, 15008))), services=(service("cart", VIP),)
        ),
        VIP,
        80,
    ),
    ("malformed", world(), "10.0.0.300", 80),
    ("malformed", world(), "10.0.1.1", 0),
    ("waypoint_unresolved", world(CART, services=(service("cart", VIP, waypoint=WAYPOINT),)), VIP, 80),
    (
        "waypoint_unsupported",
        world(CART, services=(service("cart", VIP, waypoint=WAYPOINT), service("waypoint", "10.96.0.99"))),
        VIP,
        80,
    ),
    (
        "waypoint_unsupported",
        world(
            workload("cart-1", "10.0.1.1", waypoint=GatewayAddress(ipaddress.ip_address("10.0.1.9"))),
            workload("wp-1", "10.0.1.9"),
        ),
        "10.0.1.1",
        80,
    ),
    ("malformed", world(workload("cart-1", "10.0.1.1", service_account="a/b")), "10.0.1.1", 80),
]


@pytest.mark.parametrize(("reason", "known", "ip", "port"), REFUSED)
def test_what_cannot_be_reached_as_the_mesh_demands_is_refused(
    reason: str, known: World | None, ip: str, port: int
) -> None:
    answer = route(known, ip, port)
    assert (answer.kind, answer.reason, answer.hops) == ("refused", reason, ())
    assert answer.message


def test_the_mesh_ports_of_strangers_are_nobodys_business() -> None:
    known = world(workload("old-1", "10.0.1.7", enrolled=False))
    assert route(known, "10.0.1.7", 15001).kind == "tcp"
    assert route(known, "192.0.2.1", 15008).kind == "tcp"


def test_traffic_to_a_service_ignores_the_waypoint_of_its_workloads() -> None:
    known = world(
        workload("cart-1", "10.0.1.1", services=serves("cart"), waypoint=WAYPOINT), services=(service("cart", VIP),)
    )
    assert route(known, VIP, 80).kind == "hbone"


def test_a_source_that_is_not_enrolled_here_is_refused() -> None:
    assert route(world(CART), "10.0.1.1", 80, source="uid-other").reason == "unknown_source"


def test_a_source_the_control_plane_does_not_know_yet_may_already_connect() -> None:
    answer = route(World.of([CART]), "10.0.1.1", 80)
    assert answer.kind == "hbone" and answer.identity == spiffe("web")
    assert answer.baggage == "k8s.namespace.name=shop,k8s.pod.name=web-1"


def test_an_address_this_node_gave_to_another_pod_is_refused_until_the_world_knows() -> None:
    local = Local.of(NODE, [WEB, pod("new-1", "10.0.0.2")])
    stale = world(workload("cart-1", "10.0.0.2", services=serves("cart")), services=(service("cart", VIP),))
    assert route(stale, "10.0.0.2", 80, local=local).reason == "stale_destination"
    assert route(stale, VIP, 80, local=local).reason == "no_endpoint"
    fresh = world(workload("new-1", "10.0.0.2"))
    assert route(fresh, "10.0.0.2", 80, local=local).hops[0].identities == (spiffe("new"),)


def test_a_pod_of_the_same_name_with_another_account_is_another_pod() -> None:
    local = Local.of(NODE, [WEB, pod("cart-1", "10.0.0.2", account="thief")])
    stale = world(workload("cart-1", "10.0.0.2"))
    assert route(stale, "10.0.0.2", 80, local=local).reason == "stale_destination"


def test_baggage_says_who_the_source_is_and_leaves_out_what_cannot_be_said() -> None:
    source = workload(
        "web-1",
        "10.0.0.1",
        workload_type=WorkloadType.DEPLOYMENT,
        canonical_revision="v1,x",
        locality=Locality("eu", "eu-1"),
    )
    answer = route(World.of([source, CART]), "10.0.1.1", 80)
    assert answer.baggage == (
        "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=web,service.name=web,"
        "cloud.region=eu,cloud.availability_zone=eu-1"
    )


REGION, ZONE, ON_NODE = LoadBalancingScope.REGION, LoadBalancingScope.ZONE, LoadBalancingScope.NODE
FAILOVER, STRICT = LoadBalancingMode.FAILOVER, LoadBalancingMode.STRICT
PREFERENCES = [
    ((), LoadBalancingMode.UNSPECIFIED, "abcd"),
    ((REGION,), FAILOVER, "abc"),
    ((REGION, ZONE), FAILOVER, "ab"),
    ((REGION, ZONE, ON_NODE), FAILOVER, "a"),
    ((ZONE, REGION), FAILOVER, "ab"),
    ((ON_NODE,), STRICT, "a"),
    ((REGION, ZONE), STRICT, "ab"),
    ((LoadBalancingScope.NETWORK, LoadBalancingScope.CLUSTER), STRICT, "abcd"),
    ((LoadBalancingScope.SUBZONE,), STRICT, ""),
    ((LoadBalancingScope.SUBZONE,), FAILOVER, "abcd"),
]


@pytest.mark.parametrize(("preference", "mode", "wanted"), PREFERENCES)
def test_endpoints_are_preferred_by_where_they_are(
    preference: tuple[LoadBalancingScope, ...], mode: LoadBalancingMode, wanted: str
) -> None:
    def at(name: str, ip: str, locality: Locality, node: str) -> Any:
        return workload(name, ip, services=serves("cart"), locality=locality, node=node)

    known = World.of(
        [
            workload("web-1", "10.0.0.1", locality=Locality("eu", "eu-1", "here")),
            at("a", "10.0.1.1", Locality("eu", "eu-1"), NODE),
            at("b", "10.0.1.2", Locality("eu", "eu-1"), "other"),
            at("c", "10.0.1.3", Locality("eu", "eu-2"), "other"),
            at("d", "10.0.1.4", Locality("us", "us-1"), "other"),
        ],
        [service("cart", VIP, load_balancing=LoadBalancing(preference, mode))],
    )
    answer = route(known, VIP, 80)
    assert "".join(h.destination[-1] for h in answer.hops) == wanted
    assert answer.reason == ("" if wanted else "no_endpoint")


def test_a_passthrough_service_goes_to_the_address_that_was_asked_for() -> None:
    balancing = LoadBalancing(mode=LoadBalancingMode.PASSTHROUGH)
    known = world(services=(service("cart", VIP, load_balancing=balancing),))
    assert route(known, VIP, 9999).hops[0].endpoint == f"{VIP}:9999"
