"""What is pushed when the World changes: exactly the answers that came out differently."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from ambient.model.policy import Action
from ambient.model.workload import TunnelProtocol, WorkloadStatus
from ambient.model.world import Diff, World, diff
from tests.support.shop import NODE, STRICT, from_account, from_net, pod, policy, serves, service, spiffe, workload
from ztunnel.core.authorize import decide_verdict
from ztunnel.core.local import Local
from ztunnel.core.messages import HOLD_S, AskRoute, AskVerdict, Forget, Message, Route, Synced, Verdict
from ztunnel.core.route import decide_route
from ztunnel.core.state import UNKNOWN_HOLD_S, Decisions

VIP = "10.96.0.10"
WEB, CART = pod("web-1", "10.0.0.1"), pod("cart-1", "10.0.0.2")
WORLD = World.of(
    [workload("web-1", "10.0.0.1"), workload("cart-1", "10.0.0.2", services=serves("cart"))], [service("cart", VIP)]
)
ROUTE = AskRoute(source="uid-web-1", ip=VIP, port=80)
DIRECT = AskRoute(source="uid-web-1", ip="10.0.0.2", port=8080)
OUTSIDE = AskRoute(source="uid-web-1", ip="192.0.2.1", port=443)


def ask_verdict(identity: str = spiffe("web"), source_ip: str = "10.0.0.1") -> AskVerdict:
    return AskVerdict(
        destination="uid-cart-1", destination_ip="10.0.0.2", port=8080, identity=identity, source_ip=source_ip
    )


def decisions(known: World | None = WORLD, *pods: Any) -> Decisions:
    return Decisions(Local.of(NODE, pods or (WEB, CART)), known, generation=100)


def change(state: Decisions, **parts: Any) -> list[tuple[int, Message]]:
    assert state.world is not None
    part = Diff(**parts)
    return state.apply(state.world.apply(part), part)


def one(outgoing: list[tuple[int, Message]]) -> Any:
    assert len(outgoing) == 1
    return outgoing[0][1]


def test_a_question_is_answered_at_once_and_remembered() -> None:
    state = decisions()
    answer = one(state.ask(1, ROUTE, 0.0))
    assert isinstance(answer, Route) and answer.kind == "hbone"
    assert state.ask(2, ROUTE, 0.0) == [(2, answer)]
    assert state.kept == 1


def test_only_what_came_out_differently_is_pushed_and_only_to_those_who_hold_it() -> None:
    state = decisions()
    state.ask(1, ROUTE, 0.0)
    state.ask(2, DIRECT, 0.0)
    state.ask(1, OUTSIDE, 0.0)
    pushed = change(state, workloads=(workload("cart-2", "10.0.0.3", services=serves("cart")),))
    assert [(w, type(m), m.ip) for w, m in pushed if isinstance(m, Route)] == [(1, Route, VIP)]
    assert len(pushed) == 1 and pushed[0][1].generation > 100  # type: ignore[union-attr]


def test_a_change_that_makes_no_difference_pushes_nothing() -> None:
    state = decisions()
    state.ask(1, ROUTE, 0.0)
    state.ask(1, ask_verdict(), 0.0)
    old = WORLD.workloads["Kubernetes//Pod/shop/cart-1"]
    assert change(state, workloads=(dataclasses.replace(old, canonical_revision="v2"),)) == []
    assert change(state, policies=(policy("unrelated", Action.DENY, from_account("eve")),)) == []


def test_a_policy_takes_a_right_away_and_gives_it_back() -> None:
    state = decisions()
    assert one(state.ask(1, ask_verdict(), 0.0)).allow
    denied = one(change(state, policies=(policy("no", Action.DENY, from_account("web")),)))
    assert (denied.allow, denied.policy, denied.source_ip) == (False, "shop/no", "")
    again = one(change(state, removed_policies=("shop/no",)))
    assert again.allow and again.generation > denied.generation


def test_a_mode_that_becomes_strict_reaches_every_worker_that_let_plaintext_in() -> None:
    state = decisions()
    for worker in (1, 2):
        state.ask(worker, ask_verdict(identity=""), 0.0)
    state.ask(3, ask_verdict(), 0.0)
    old = WORLD.workloads["Kubernetes//Pod/shop/cart-1"]
    pushed = change(state, workloads=(dataclasses.replace(old, policies=(STRICT.key,)),), policies=(STRICT,))
    assert [(w, m.allow, m.reason) for w, m in pushed if isinstance(m, Verdict)] == [
        (1, False, "strict"),
        (2, False, "strict"),
    ]


def test_a_listed_policy_counts_from_when_it_becomes_known() -> None:
    old = WORLD.workloads["Kubernetes//Pod/shop/cart-1"]
    state = decisions(WORLD.apply(Diff(workloads=(dataclasses.replace(old, policies=(STRICT.key,)),))))
    assert one(state.ask(1, ask_verdict(identity=""), 0.0)).allow
    assert not one(change(state, policies=(STRICT,))).allow


def test_when_source_addresses_begin_to_matter_the_workers_ask_again() -> None:
    state = decisions()
    assert one(state.ask(1, ask_verdict(), 0.0)).source_ip == ""
    pushed = change(state, policies=(policy("net", Action.ALLOW, from_net("10.0.0.0/24")),))
    assert pushed == [(1, Synced())]
    assert one(state.ask(1, ask_verdict(), 0.0)).source_ip == "10.0.0.1"
    assert not one(state.ask(1, ask_verdict(source_ip="192.0.2.1"), 0.0)).allow
    assert state.kept == 2
    # and when they matter no more, each kept answer stands for the address it was given for
    later = change(state, removed_policies=("shop/net",))
    assert sorted((m.allow, m.source_ip) for _, m in later if isinstance(m, Verdict)) == [
        (True, "10.0.0.1"),
        (True, "192.0.2.1"),
    ]


def test_without_a_world_a_question_is_held_then_answered_when_it_comes() -> None:
    state = decisions(None)
    assert state.ask(1, ROUTE, 0.0) == [] and state.held == 1
    assert state.expire(HOLD_S - 0.1) == []
    answer = one(state.apply(WORLD, diff(World(), WORLD)))
    assert answer.kind == "hbone" and state.held == 0


def test_without_a_world_a_question_is_refused_in_the_end_and_corrected_when_it_comes() -> None:
    state = decisions(None)
    state.ask(1, ROUTE, 0.0)
    refused = one(state.expire(HOLD_S))
    assert (refused.kind, refused.reason) == ("refused", "not_synced")
    assert state.ask(1, ROUTE, 20.0) == [], "the next connection is held again"
    pushed = state.apply(WORLD, diff(World(), WORLD))
    assert {m.kind for _, m in pushed if isinstance(m, Route)} == {"hbone"}


def test_a_question_about_a_pod_that_is_just_arriving_waits_for_it() -> None:
    state = Decisions(Local.of(NODE), WORLD)
    assert state.ask(1, ROUTE, 0.0) == [] and state.ask(1, ask_verdict(), 0.0) == []
    assert one(state.put_pod(WEB)).kind == "hbone"
    assert one(state.put_pod(CART)).allow
    state.remove_pod("uid-web-1")
    other = replace(ROUTE, port=81)
    assert state.ask(1, other, 10.0) == []
    assert one(state.expire(10.0 + UNKNOWN_HOLD_S)).reason == "unknown_source"


def test_a_pod_that_goes_takes_its_rights_with_it() -> None:
    state = decisions()
    state.ask(1, ask_verdict(), 0.0)
    gone = one(state.remove_pod("uid-cart-1"))
    assert (gone.allow, gone.reason) == (False, "unknown_destination")
    assert one(state.put_pod(CART)).allow


def test_a_pod_with_a_malformed_address_changes_nothing() -> None:
    state = decisions()
    with pytest.raises(ValueError, match="nonsense"):
        state.put_pod(pod("bad-1", "nonsense"))
    assert set(state.local.pods) == {"uid-web-1", "uid-cart-1"}


def test_what_a_worker_forgot_is_not_pushed_to_it() -> None:
    state = decisions()
    state.ask(1, ROUTE, 0.0)
    state.ask(2, ROUTE, 0.0)
    state.ask(1, ask_verdict(), 0.0)
    state.forget(
        1, Forget(routes=(("uid-web-1", VIP, 80),), verdicts=(("uid-cart-1", "10.0.0.2", 8080, spiffe("web"), ""),))
    )
    pushed = change(
        state,
        workloads=(workload("cart-2", "10.0.0.3", services=serves("cart")),),
        policies=(policy("no", Action.DENY, from_account("web")),),
    )
    assert [w for w, _ in pushed] == [2]
    state.forget_worker(2)
    assert state.kept == 0 and state._index == {}


def test_what_cannot_be_remembered_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ztunnel.core.state.ANSWERS_MAX", 1)
    state = decisions()
    assert one(state.ask(1, ROUTE, 0.0)).kind == "hbone"
    assert one(state.ask(1, DIRECT, 0.0)).reason == "too_many_decisions"
    assert one(state.ask(1, ask_verdict(), 0.0)).allow is False
    assert state.counters["refused_too_many_decisions"] == 2


NAMES = ("web-1", "cart-1", "cart-2")
ADDRESSES = ("10.0.0.1", "10.0.0.2", "10.0.0.3")
some_workloads = st.builds(
    lambda name, address, enrolled, healthy, listed, behind: workload(
        name,
        address,
        protocol=TunnelProtocol.HBONE if enrolled else TunnelProtocol.NONE,
        status=WorkloadStatus.HEALTHY if healthy else WorkloadStatus.UNHEALTHY,
        policies=(STRICT.key,) if listed else (),
        services=serves("cart") if behind else (),
    ),
    st.sampled_from(NAMES),
    st.sampled_from(ADDRESSES),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
some_policies = st.sampled_from(
    (
        STRICT,
        policy("a", Action.DENY, from_account("web")),
        policy("b", Action.ALLOW, from_account("cart")),
        policy("c", Action.ALLOW, from_net("10.0.0.0/31")),
    )
)
some_worlds = st.builds(
    World.of,
    st.lists(some_workloads, max_size=3, unique_by=lambda w: w.uid),
    st.sampled_from(((), (service("cart", VIP),), (service("cart", VIP, "10.96.0.11"),))),
    st.lists(some_policies, max_size=3, unique_by=lambda p: p.key),
)
some_pods = st.lists(
    st.builds(pod, st.sampled_from(NAMES), st.sampled_from(ADDRESSES)), max_size=3, unique_by=lambda p: p.uid
)
some_asks = st.one_of(
    st.builds(
        AskRoute,
        source=st.sampled_from([f"uid-{n}" for n in NAMES]),
        ip=st.sampled_from((*ADDRESSES, VIP, "10.96.0.11", "192.0.2.1")),
        port=st.sampled_from((80, 8080)),
    ),
    st.builds(
        AskVerdict,
        destination=st.sampled_from([f"uid-{n}" for n in NAMES]),
        destination_ip=st.sampled_from(ADDRESSES),
        port=st.just(8080),
        identity=st.sampled_from(("", spiffe("web"), spiffe("cart"))),
        source_ip=st.sampled_from(ADDRESSES),
    ),
)


@given(st.lists(st.one_of(some_worlds, some_pods, some_asks), max_size=25))
@settings(max_examples=300, deadline=None)
def test_after_any_history_a_worker_holds_what_would_be_decided_now(steps: list[Any]) -> None:
    """The reference: a worker's cache fed by the pushes, against a fresh decision for each of its keys."""
    state = Decisions(Local.of(NODE))
    cache: dict[tuple[Any, ...], Any] = {}
    asked: set[Any] = set()
    pods: dict[str, Any] = {}
    now = 0.0

    def take(outgoing: list[tuple[int, Message]]) -> None:
        for _, message in outgoing:
            if isinstance(message, Route):
                cache[message.source, message.ip, message.port] = message
            elif isinstance(message, Verdict):
                at = message.destination, message.destination_ip, message.port, message.identity
                if message.source_ip:
                    cache.pop((*at, ""), None)
                cache[(*at, message.source_ip)] = message
            elif isinstance(message, Synced):
                for ask in sorted(asked, key=repr):
                    take(state.ask(1, ask, now))

    for step in steps:
        now += 20.0
        if isinstance(step, World):
            take(state.apply(step, diff(state.world or World(), step)))
        elif isinstance(step, list):
            for uid in set(pods) - {p.uid for p in step}:
                take(state.remove_pod(uid))
            for p in step:
                take(state.put_pod(p))
            pods = {p.uid: p for p in step}
        else:
            asked.add(step)
            take(state.ask(1, step, now))
        take(state.expire(now + 19.0))
    for ask in asked:
        if isinstance(ask, AskRoute):
            wanted: Any = decide_route(state.world, state.local, ask, 0)
            got = cache[ask.source, ask.ip, ask.port]
        else:
            wanted = decide_verdict(state.world, state.local, ask, 0)
            at = ask.destination, ask.destination_ip, ask.port, ask.identity
            got = cache.get((*at, "")) or cache[(*at, ask.source_ip)]
            wanted = replace(wanted, source_ip=got.source_ip)
        assert replace(got, generation=0) == wanted


def test_the_first_world_is_applied_whatever_its_diff_says() -> None:
    state = decisions(None)
    state.ask(1, ROUTE, 0.0)
    state.expire(HOLD_S)
    assert one(state.apply(WORLD, Diff())).kind == "hbone"
