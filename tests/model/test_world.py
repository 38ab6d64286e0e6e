"""The World: applying differences, and indexes that always agree with the objects."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ambient.model.address import parse_ip
from ambient.model.policy import Action, Policy, Scope
from ambient.model.workload import LoadBalancing, Port, Service, TunnelProtocol, Workload, WorkloadStatus
from ambient.model.world import Diff, World, diff

names = st.sampled_from(["a", "b", "c", "d"])
spaces = st.sampled_from(["ns", "other"])
service_names = st.sampled_from(["x", "y"])


def service_key(name: str) -> str:
    return f"ns/{name}.ns.svc"


def workload(name: str, address: str | None, **changes: Any) -> Workload:
    addresses = (parse_ip(address),) if address else ()
    return dataclasses.replace(Workload(f"c//Pod/ns/{name}", name, "ns", addresses), **changes)


def service(name: str, vip: str | None, **changes: Any) -> Service:
    vips = (parse_ip(vip),) if vip else ()
    return dataclasses.replace(Service(name, "ns", f"{name}.ns.svc", vips, (Port(80, 8080),)), **changes)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Worlds as they are published: no two pods own one address, no two services one VIP."""
    chosen = draw(st.lists(names, unique=True))
    addresses = draw(st.permutations(["10.0.0.1", "10.0.0.2", "fd00::1", "::ffff:10.0.0.9"]))
    workloads = []
    for name, address in zip(chosen, addresses, strict=False):
        serves = draw(st.lists(service_names, unique=True))
        workloads.append(
            workload(
                name,
                draw(st.sampled_from([address, None])),
                services=tuple((service_key(s), (Port(80, draw(st.sampled_from([8080, 9090]))),)) for s in serves),
                status=draw(st.sampled_from(WorkloadStatus)),
                protocol=draw(st.sampled_from(TunnelProtocol)),
                host_network=draw(st.booleans()),
                policies=tuple(draw(st.lists(st.sampled_from(["ns/p", "ns/q"]), unique=True))),
            )
        )
    services = [
        service(
            name,
            draw(st.sampled_from([vip, None])),
            load_balancing=LoadBalancing(allow_unhealthy=draw(st.booleans())),
        )
        for name, vip in zip(
            draw(st.lists(service_names, unique=True)), draw(st.permutations(["10.96.0.1", "10.96.0.2"])), strict=False
        )
    ]
    policies = [
        Policy(
            name, draw(st.sampled_from(["ns", "other"])), draw(st.sampled_from(Scope)), draw(st.sampled_from(Action))
        )
        for name in draw(st.lists(st.sampled_from(["p", "q"]), unique=True))
    ]
    return World.of(workloads, services, policies)


def agrees(world: World) -> None:
    """Every index answers as a search through the objects would."""
    for address in ("10.0.0.1", "10.0.0.2", "fd00::1", "10.0.0.9", "10.96.0.1", "10.96.0.2"):
        ip = parse_ip(address)
        owners = [w for w in world.workloads.values() if ip in w.addresses and not w.host_network]
        assert world.workload_at(ip) == (owners[0] if owners else None)
        holders = [s for s in world.services.values() if ip in s.vips]
        assert world.service_at(ip) == (holders[0] if holders else None)
    for held in world.services.values():
        expected = [
            (w.uid, p)
            for w in sorted(world.workloads.values(), key=lambda w: w.uid)
            for key, ports in w.services
            if key == held.key
            for p in ports
            if w.status is WorkloadStatus.HEALTHY or held.load_balancing.allow_unhealthy
        ]
        assert [(e.workload.uid, e.port) for e in world.endpoints(held, 80)] == expected
        assert world.endpoints(held, 81) == ()
    for known in world.workloads.values():
        in_force = {
            p.key
            for p in world.policies.values()
            if p.scope is Scope.GLOBAL
            or (p.scope is Scope.NAMESPACE and p.namespace == known.namespace)
            or p.key in known.policies
        }
        assert {p.key for p in world.policies_for(known)} == in_force


@given(worlds(), worlds())
def test_a_world_plus_the_difference_to_another_is_the_other(old: World, new: World) -> None:
    made = old.apply(diff(old, new))
    assert made == new
    agrees(made)


@given(worlds())
def test_a_world_does_not_differ_from_itself(world: World) -> None:
    assert not diff(world, world)
    assert not diff(world, World.of(world.workloads.values(), world.services.values(), world.policies.values()))
    agrees(world)


@given(worlds(), worlds())
def test_the_difference_says_only_what_differs(old: World, new: World) -> None:
    change = diff(old, new)
    assert all(old.workloads.get(w.uid) != w for w in change.workloads)
    assert all(old.services.get(s.key) != s for s in change.services)
    assert all(old.policies.get(p.key) != p for p in change.policies)
    assert set(change.removed_workloads) == set(old.workloads) - set(new.workloads)
    assert bool(change) == (old != new)


@given(worlds(), worlds(), worlds())
def test_an_old_snapshot_is_not_touched_by_what_follows(first: World, second: World, third: World) -> None:
    before = dict(first.workloads)
    made = first.apply(diff(first, second)).apply(diff(second, third))
    assert made == third and dict(first.workloads) == before
    agrees(first)


def test_an_address_moves_from_one_workload_to_another_in_one_difference() -> None:
    one, two = workload("a", "10.0.0.1"), workload("b", "10.0.0.2")
    world = World.of([one, two])
    swapped = world.apply(Diff(workloads=(workload("a", "10.0.0.2"), workload("b", "10.0.0.1"))))
    assert swapped.workload_at(parse_ip("10.0.0.1")) == workload("b", "10.0.0.1")
    assert swapped.workload_at(parse_ip("10.0.0.2")) == workload("a", "10.0.0.2")
    agrees(swapped)


def test_an_address_taken_first_and_given_up_later_stays_with_the_taker() -> None:
    world = World.of([workload("a", "10.0.0.1")]).apply(Diff(workloads=(workload("b", "10.0.0.1"),)))
    later = world.apply(Diff(removed_workloads=(workload("a", None).uid,)))
    assert later.workload_at(parse_ip("10.0.0.1")) == workload("b", "10.0.0.1")


def test_removing_what_is_not_there_does_nothing() -> None:
    world = World.of([workload("a", "10.0.0.1")])
    gone = Diff(removed_workloads=("no",), removed_services=("no",), removed_policies=("no",))
    assert world.apply(gone) == world


def test_a_mapped_address_is_found_as_ipv4_and_networks_are_apart() -> None:
    world = World.of([workload("a", "10.0.0.1"), workload("b", "10.0.0.1", network="east")])
    found = world.workload_at(parse_ip("::ffff:10.0.0.1"))
    assert found is not None and found.name == "a"
    east = world.workload_at(parse_ip("10.0.0.1"), "east")
    assert east is not None and east.name == "b"
    assert world.workload_at(parse_ip("10.0.0.1"), "west") is None
