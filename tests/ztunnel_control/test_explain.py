"""What ztunnel says on /why is what it would do: its own decisions, with the policies that were asked."""

from __future__ import annotations

from typing import Any

import pytest

from ambient.model.policy import Action, Group, Match, MatchKind, Policy, Rule, Scope, StringMatch
from ambient.model.world import World
from tests.support.shop import NODE, pod, principal, serves, service, spiffe, workload
from ztunnel.core.explain import explain
from ztunnel.core.local import Local

LOCAL = Local.of(NODE, [pod("web-1", "10.0.0.1"), pod("here-1", "10.0.0.2")])
DENY_WEB = Policy(
    "deny-web",
    "shop",
    Scope.NAMESPACE,
    Action.DENY,
    (Group((Rule((Match(principals=(StringMatch(MatchKind.EXACT, principal("web")),)),)),)),),
)
OTHER = Policy("other", "elsewhere", Scope.NAMESPACE, Action.DENY)


def world(*policies: Policy) -> World:
    return World.of(
        [
            workload("web-1", "10.0.0.1"),
            workload("here-1", "10.0.0.2"),
            workload("far-1", "10.0.1.1", node="node-b", services=serves("far")),
            workload("plain-1", "10.0.1.2", enrolled=False, node="node-b"),
        ],
        [service("far", "10.96.0.1")],
        policies,
    )


def ask(known: World | None, **query: Any) -> Any:
    return explain(known, LOCAL, {name: str(value) for name, value in query.items()})


def test_a_service_is_explained_with_its_endpoints_and_the_policies_there() -> None:
    found = ask(world(DENY_WEB, OTHER), source="uid-web-1", ip="10.96.0.1", port=80)
    assert (found["route"]["kind"], found["route"]["identity"]) == ("hbone", spiffe("web"))
    (verdict,) = found["verdicts"]
    assert (verdict["endpoint"], verdict["node"], verdict["allow"]) == ("10.0.1.1:8080", "node-b", False)
    assert (verdict["policy"], verdict["reason"]) == ("shop/deny-web", "policy")
    assert verdict["policies"] == [
        {"policy": "shop/deny-web", "action": "deny", "scope": "namespace", "dry_run": False, "matches": True}
    ]
    assert ask(world(), source="uid-web-1", ip="10.96.0.1", port=80)["verdicts"][0]["reason"] == "no_policy"


def test_a_destination_of_this_node_is_judged_by_the_very_function_that_workers_ask() -> None:
    found = ask(world(DENY_WEB), source="uid-web-1", ip="10.0.0.2", port=8080)
    assert (found["verdicts"][0]["allow"], found["verdicts"][0]["policy"]) == (False, "shop/deny-web")
    guarded = ask(world(), ip="10.0.0.2", port=15008)["verdicts"][0]
    assert (guarded["allow"], guarded["reason"]) == (False, "recursion")


def test_a_peer_without_identity_is_judged_as_such() -> None:
    strict = Policy(
        "istio_converted_static_strict",
        "istio-system",
        Scope.GLOBAL,
        Action.DENY,
        (Group((Rule((Match(not_principals=(StringMatch(MatchKind.PRESENCE),)),)),)),),
    )
    found = ask(world(strict), ip="10.0.1.1", port=8080, source_ip="10.9.9.9")
    assert found["route"] is None
    assert (found["verdicts"][0]["allow"], found["verdicts"][0]["reason"]) == (False, "strict")
    assert ask(world(strict), source="uid-web-1", ip="10.0.1.1", port=8080)["verdicts"][0]["allow"] is True


def test_what_is_outside_the_mesh_or_not_known_yet_is_said() -> None:
    assert ask(world(), source="uid-web-1", ip="10.0.1.2", port=80)["verdicts"] == []
    assert ask(world(), ip="192.0.2.1", port=80)["verdicts"][0]["reason"] == "not_mesh"
    unsynced = ask(None, source="uid-web-1", ip="10.0.1.1", port=80)
    assert (unsynced["synced"], unsynced["route"]["reason"]) == (False, "not_synced")


@pytest.mark.parametrize(
    "query", [{}, {"ip": "x", "port": 1}, {"ip": "10.0.0.1", "port": 0}, {"ip": "::1", "port": "a"}]
)
def test_what_cannot_be_understood_is_a_value_error(query: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        ask(world(), **query)
