"""From the World and this node's pods to map entries, and from one set of entries to another."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambient.datapath import entries
from ambient.datapath.entries import ALLOW_ANY, ENROLLED, LOCAL, WAYPOINT, LocalPod
from ambient.datapath.layout import LAYOUT
from ambient.datapath.numbers import NUMBER_MAX, Numbers
from ambient.datapath.plan import plan
from ambient.datapath.values import ServiceKey, WorkloadValue
from ambient.model.address import parse_ip
from ambient.model.policy import Action, Policy, Scope
from ambient.model.workload import GatewayAddress, Port, Service, TunnelProtocol, Workload
from ambient.model.world import World

NODE = "n1"


def workload(name: str, address: str, node: str = "n2", **more: object) -> Workload:
    return Workload(
        uid=f"Kubernetes//Pod/shop/{name}",
        name=name,
        namespace="shop",
        addresses=(parse_ip(address),),
        node=node,
        **more,
    )  # type: ignore[arg-type]


REMOTE = workload("far", "10.2.0.5", protocol=TunnelProtocol.HBONE)
OFF = LAYOUT["WORKLOAD_OFF"]


def local_workloads(pods: list[LocalPod], numbers: Numbers | None = None) -> dict[str, WorkloadValue]:
    return entries.local_workloads(entries.rights(World(), pods), lambda pod: pod.generation, numbers or Numbers())


HERE = LocalPod("Kubernetes//Pod/shop/near", ("10.1.0.5", "fd00::5"), generation=77, enrolled=True)


def test_a_remote_enrolled_workload_is_marked_so() -> None:
    found = entries.remote_workloads(World.of([REMOTE, workload("plain", "10.2.0.6")]), NODE, Numbers())
    assert found["10.2.0.5"].flags == ENROLLED | ALLOW_ANY
    assert found["10.2.0.6"].flags == ALLOW_ANY
    assert found["10.2.0.5"].workload != found["10.2.0.6"].workload


def test_host_network_workloads_are_never_keys() -> None:
    assert entries.remote_workloads(World.of([replace(REMOTE, host_network=True)]), NODE, Numbers()) == {}


def test_discovery_says_nothing_of_this_nodes_addresses() -> None:
    assert entries.remote_workloads(World.of([replace(REMOTE, node=NODE)]), NODE, Numbers()) == {}


def test_a_local_pod_has_its_own_generation_on_every_address() -> None:
    found = local_workloads([HERE])
    assert {a: (v.flags, v.generation) for a, v in found.items()} == {
        "10.1.0.5": (LOCAL | ENROLLED | OFF, 77),
        "fd00::5": (LOCAL | ENROLLED | OFF, 77),
    }


def test_a_pod_that_left_stays_known_as_not_enrolled() -> None:
    found = local_workloads([replace(HERE, enrolled=False)])
    assert found["10.1.0.5"].flags == LOCAL


def test_open_on_failure_is_said_of_enrolled_pods_only() -> None:
    found = local_workloads([replace(HERE, open=True)])
    assert found["10.1.0.5"].flags == LOCAL | ENROLLED | OFF | entries.OPEN
    found = local_workloads([replace(HERE, open=True, enrolled=False)])
    assert found["10.1.0.5"].flags == LOCAL


def test_a_reused_address_names_the_later_pod() -> None:
    later = LocalPod("Kubernetes//Pod/shop/later", ("10.1.0.5",), generation=78, enrolled=True)
    numbers = Numbers()
    for order in ([HERE, later], [later, HERE]):
        found = local_workloads(order, numbers)
        assert found["10.1.0.5"].workload == numbers.of(later.workload_uid)
        assert found["10.1.0.5"].generation == 78


@pytest.mark.parametrize(
    ("policy", "selected"),
    [
        (Policy("p", "istio-system", Scope.GLOBAL, Action.DENY), True),
        (Policy("p", "shop", Scope.NAMESPACE, Action.ALLOW), True),
        (Policy("p", "other", Scope.NAMESPACE, Action.ALLOW), False),
        (Policy("p", "shop", Scope.WORKLOAD_SELECTOR, Action.ALLOW), False),
    ],
)
def test_allow_any_means_that_no_policy_selects_the_workload(policy: Policy, selected: bool) -> None:
    found = entries.remote_workloads(World.of([REMOTE], [], [policy]), NODE, Numbers())
    assert bool(found["10.2.0.5"].flags & ALLOW_ANY) is not selected


def test_a_policy_listed_by_the_workload_selects_it() -> None:
    policy = Policy("p", "shop", Scope.WORKLOAD_SELECTOR, Action.ALLOW)
    found = entries.remote_workloads(World.of([replace(REMOTE, policies=("shop/p",))], [], [policy]), NODE, Numbers())
    assert not found["10.2.0.5"].flags & ALLOW_ANY


def test_every_port_of_every_vip_is_a_key_and_a_headless_service_has_none() -> None:
    vips = (parse_ip("10.96.0.1"), parse_ip("fd96::1"))
    service = Service("web", "shop", "web.shop.svc.cluster.local", vips, (Port(80, 8080), Port(443, 8443)))
    gateway = replace(service, name="gw", hostname="gw", vips=vips[:1], waypoint=GatewayAddress("shop/wp"))
    found = entries.services(World.of([], [service, replace(service, hostname="h", vips=())]), Numbers())
    assert set(found) == {ServiceKey(str(v), p) for v in vips for p in (80, 443)}
    assert {v.flags for v in found.values()} == {0}
    assert {v.flags for v in entries.services(World.of([], [gateway]), Numbers()).values()} == {WAYPOINT}


tables = st.dictionaries(st.integers(0, 30), st.integers(0, 3))


@given(tables, tables)
def test_applying_a_plan_gives_what_is_wanted_and_twice_does_nothing(
    have: dict[int, int], want: dict[int, int]
) -> None:
    steps = plan(have, want)
    table = dict(have)
    for key in steps.deletes:
        del table[key]
    for key, value in steps.puts:
        assert table.get(key) != value
        table[key] = value
    assert table == want
    assert not plan(table, want)


@given(st.lists(st.sampled_from("abcdef")), st.sets(st.sampled_from("abcdef")))
def test_a_number_is_never_given_again(names: list[str], kept: set[str]) -> None:
    numbers = Numbers()
    first = {name: numbers.of(name) for name in names}
    assert len(set(first.values())) == len(first) and 0 not in first.values()
    numbers.retain(kept)
    again = Numbers({name: number for number, name in numbers.names().items()}, numbers.next)
    for name in names:
        assert (again.of(name) == first[name]) is (name in kept)
        assert name in kept or again.of(name) > max(first.values())


def test_numbers_that_run_out_are_refused() -> None:
    numbers = Numbers({}, NUMBER_MAX)
    assert numbers.of("a") == NUMBER_MAX
    with pytest.raises(OverflowError):
        numbers.of("b")
