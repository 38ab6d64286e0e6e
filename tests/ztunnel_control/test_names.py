"""Which names the mesh answers, with which addresses, and which it forwards."""

from __future__ import annotations

import pytest

from ambient.model.workload import WorkloadStatus
from ambient.model.world import World
from tests.support.shop import ips, serves, service, workload
from ztunnel.core.dns import TYPE_A, TYPE_AAAA, Question, build_answer, parse_query
from ztunnel.core.names import Names, Outcome, Resolution

WORLD = World.of(
    [
        workload("db-0", "10.0.0.5", "fd00::5", services=serves("db"), hostname="db-0.db.shop.svc.cluster.local"),
        workload("db-1", "10.0.0.6", services=serves("db")),
        workload("db-2", "10.0.0.7", services=serves("db"), status=WorkloadStatus.UNHEALTHY),
    ],
    [
        service("cart", "10.96.0.10", "fd96::10"),
        service("four", "10.96.0.11"),
        service("db"),
        service("idle"),
        service("ext", "240.0.0.1", hostname="api.example.org"),
        service("ext", "240.0.0.2", namespace="away", hostname="api.example.org"),
        service("wild", "240.0.0.3", hostname="*.wild.example.org"),
    ],
)
NAMES = Names.of(WORLD)
FORWARD, NODATA, ANSWER = Outcome.FORWARD, Outcome.NODATA, Outcome.ANSWER

TABLE = [
    ("cart.shop.svc.cluster.local", TYPE_A, ANSWER, ("10.96.0.10",), ""),
    ("cart.shop.svc.cluster.local", TYPE_AAAA, ANSWER, ("fd96::10",), ""),
    ("four.shop.svc.cluster.local", TYPE_AAAA, NODATA, (), ""),
    ("db.shop.svc.cluster.local", TYPE_A, ANSWER, ("10.0.0.5", "10.0.0.6"), ""),
    ("db.shop.svc.cluster.local", TYPE_AAAA, ANSWER, ("fd00::5",), ""),
    ("db-0.db.shop.svc.cluster.local", TYPE_A, ANSWER, ("10.0.0.5",), ""),
    ("db-1.db.shop.svc.cluster.local", TYPE_A, FORWARD, (), ""),
    ("idle.shop.svc.cluster.local", TYPE_A, NODATA, (), ""),
    ("nothing.shop.svc.cluster.local", TYPE_A, FORWARD, (), ""),
    ("cart.shop", TYPE_A, FORWARD, (), ""),
    ("www.example.org", TYPE_A, FORWARD, (), ""),
    ("", TYPE_A, FORWARD, (), ""),
    ("cart.shop.svc.cluster.local", 33, FORWARD, (), ""),  # SRV
    ("cart.shop.svc.cluster.local", 255, FORWARD, (), ""),  # ANY
    # the asking pod's own namespace decides between equal hostnames
    ("api.example.org", TYPE_A, ANSWER, ("240.0.0.1",), ""),
    ("a.wild.example.org", TYPE_A, ANSWER, ("240.0.0.3",), ""),
    ("a.b.wild.example.org", TYPE_A, ANSWER, ("240.0.0.3",), ""),
    ("wild.example.org", TYPE_A, FORWARD, (), ""),
    # names a resolver has put a search suffix behind
    ("api.example.org.shop.svc.cluster.local", TYPE_A, ANSWER, ("240.0.0.1",), "api.example.org"),
    ("api.example.org.svc.cluster.local", TYPE_A, ANSWER, ("240.0.0.1",), "api.example.org"),
    ("api.example.org.cluster.local", TYPE_A, ANSWER, ("240.0.0.1",), "api.example.org"),
    ("api.example.org.away.svc.cluster.local", TYPE_A, FORWARD, (), ""),
    (
        "cart.shop.svc.cluster.local.shop.svc.cluster.local",
        TYPE_A,
        ANSWER,
        ("10.96.0.10",),
        "cart.shop.svc.cluster.local",
    ),
    ("api.example.org.shop.svc.cluster.local", TYPE_AAAA, NODATA, (), "api.example.org"),
]


@pytest.mark.parametrize(("name", "kind", "outcome", "addresses", "alias"), TABLE)
def test_names_resolve(name: str, kind: int, outcome: Outcome, addresses: tuple[str, ...], alias: str) -> None:
    found = NAMES.resolve(Question(name, kind), "shop", "cluster.local")
    assert found == Resolution(outcome, ips(*addresses), alias)


def test_another_namespace_sees_its_own_service_of_an_equal_hostname() -> None:
    found = NAMES.resolve(Question("api.example.org", TYPE_A), "away", "cluster.local")
    assert found.addresses == ips("240.0.0.2")


def test_other_classes_and_every_name_before_the_first_world_are_forwarded() -> None:
    assert NAMES.resolve(Question("cart.shop.svc.cluster.local", TYPE_A, 3), "shop", "cluster.local").outcome is FORWARD
    assert Names().resolve(Question("cart.shop.svc.cluster.local", TYPE_A), "shop", "cluster.local").outcome is FORWARD


def test_the_longest_wildcard_wins() -> None:
    known = World.of(
        (),
        [
            service("a", "240.0.0.1", hostname="*.example.org"),
            service("b", "240.0.0.2", hostname="*.wild.example.org"),
        ],
    )
    found = Names.of(known).resolve(Question("x.wild.example.org", TYPE_A), "shop", "cluster.local")
    assert found.addresses == ips("240.0.0.2")


def test_a_name_with_a_dot_in_a_label_is_no_wildcard_s_nor_breaks_the_answer() -> None:
    labels = [b".", *b"wild.example.org.shop.svc.cluster.local".split(b".")]
    name = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
    query = parse_query(b"\0\1\1\0\0\1\0\0\0\0\0\0" + name + b"\0\1\0\1")
    found = NAMES.resolve(query.question, "shop", "cluster.local")
    assert found.outcome is FORWARD
    assert build_answer(query, found.addresses, alias=found.alias)
