"""Who may reach a local workload: modes, policies, and everything that is refused for not being known."""

from __future__ import annotations

from typing import Any

import pytest

from ambient.model.policy import Action, Match, Scope
from ambient.model.world import World
from tests.support.shop import NODE, STRICT, from_account, from_net, pod, policy, spiffe, workload
from ztunnel.core.authorize import decide_verdict
from ztunnel.core.local import Local
from ztunnel.core.messages import AskVerdict, Verdict

CART = pod("cart-1", "10.0.0.2", "fd00::2")
LOCAL = Local.of(NODE, [CART, pod("web-1", "10.0.0.1")])


def world(*policies: Any, listed: tuple[str, ...] = (), **more: Any) -> World:
    return World.of([workload("cart-1", "10.0.0.2", "fd00::2", policies=listed, **more)], (), policies)


def verdict(known: World | None, identity: str = "", local: Local = LOCAL, **more: Any) -> Verdict:
    values: dict[str, Any] = {
        "destination": "uid-cart-1",
        "destination_ip": "10.0.0.2",
        "port": 8080,
        "identity": identity,
        "source_ip": "10.0.0.1",
    }
    return decide_verdict(known, local, AskVerdict(**{**values, **more}), 3)


STRICT_LISTED = (STRICT.key,)
ONLY_WEB = policy("only-web", Action.ALLOW, from_account("web"))
NOT_EVE = policy("not-eve", Action.DENY, from_account("eve"))
TABLE = [
    # policies, listed by the workload, identity, allowed, reason, policy
    ((), (), spiffe("web"), True, "no_policy", ""),
    ((), (), "", True, "no_policy", ""),
    ((STRICT,), STRICT_LISTED, "", False, "strict", STRICT.key),
    ((STRICT,), STRICT_LISTED, spiffe("web"), True, "no_policy", ""),
    ((STRICT,), (), "", True, "no_policy", ""),
    ((ONLY_WEB,), (), spiffe("web"), True, "policy", "shop/only-web"),
    ((ONLY_WEB,), (), spiffe("eve"), False, "default_deny", ""),
    ((ONLY_WEB,), (), "", False, "default_deny", ""),
    ((NOT_EVE,), (), spiffe("eve"), False, "policy", "shop/not-eve"),
    ((NOT_EVE,), (), "", True, "no_policy", ""),
    ((NOT_EVE, ONLY_WEB), (), spiffe("web"), True, "policy", "shop/only-web"),
    ((policy("all", Action.ALLOW, from_account("eve")), NOT_EVE), (), spiffe("eve"), False, "policy", "shop/not-eve"),
    ((policy("empty", Action.ALLOW),), (), spiffe("web"), False, "default_deny", ""),
    ((policy("other", Action.DENY, from_account("web"), namespace="away"),), (), spiffe("web"), True, "no_policy", ""),
    (
        (policy("mesh", Action.DENY, from_account("web"), namespace="istio-system", scope=Scope.GLOBAL),),
        (),
        spiffe("web"),
        False,
        "policy",
        "istio-system/mesh",
    ),
    ((), ("shop/not-there",), spiffe("web"), True, "no_policy", ""),
    ((policy("try", Action.DENY, from_account("web"), dry_run=True),), (), spiffe("web"), True, "no_policy", ""),
    ((policy("port", Action.DENY, Match(destination_ports=(8080,))),), (), "", False, "policy", "shop/port"),
    ((policy("port", Action.DENY, Match(destination_ports=(80,))),), (), "", True, "no_policy", ""),
    (
        (policy("converted_peer_authentication_x", Action.DENY, Match(destination_ports=(8080,))),),
        (),
        "",
        False,
        "strict",
        "shop/converted_peer_authentication_x",
    ),
]


@pytest.mark.parametrize(("policies", "listed", "identity", "allow", "reason", "by"), TABLE)
def test_policies_and_modes_decide(
    policies: tuple[Any, ...], listed: tuple[str, ...], identity: str, allow: bool, reason: str, by: str
) -> None:
    answer = verdict(world(*policies, listed=listed), identity)
    assert (answer.allow, answer.reason, answer.policy) == (allow, reason, by)
    assert answer.source_ip == "", "no policy looks at the source address"


REFUSED: list[tuple[str, World | None, dict[str, Any]]] = [
    ("not_synced", None, {}),
    ("unknown_destination", world(), {"destination": "uid-gone"}),
    ("unknown_destination", World(), {}),
    ("unknown_destination", world(service_account="other"), {}),
    ("unknown_destination", World.of([workload("cart-1", "10.0.0.77")]), {}),
    ("wrong_address", world(), {"destination_ip": "10.0.0.1"}),
    ("wrong_address", world(), {"destination_ip": "127.0.0.1"}),
    ("wrong_address", world(), {"destination_ip": "192.0.2.1"}),
    ("malformed", world(), {"destination_ip": "cart"}),
    ("malformed", world(), {"identity": "spiffe://cluster.local/web"}),
    ("malformed", world(), {"source_ip": "x"}),
    ("malformed", world(), {"port": 0}),
    ("malformed", world(), {"port": 65536}),
    ("recursion", world(), {"port": 15008}),
    ("recursion", world(), {"port": 15001}),
    ("trust_domain", world(), {"identity": "spiffe://other.example/ns/shop/sa/web"}),
]


@pytest.mark.parametrize(("reason", "known", "more"), REFUSED)
def test_what_is_not_known_is_refused(reason: str, known: World | None, more: dict[str, Any]) -> None:
    answer = verdict(known, **more)
    assert (answer.allow, answer.reason) == (False, reason)


def test_ipv6_and_mapped_addresses_of_the_pod_are_its_addresses() -> None:
    assert verdict(world(), destination_ip="fd00::2").allow
    assert verdict(world(), destination_ip="::ffff:10.0.0.2").allow


def test_a_clause_on_source_addresses_makes_the_answer_hold_for_one_address_only() -> None:
    known = world(policy("net", Action.ALLOW, from_net("10.0.0.0/24")))
    near, far = verdict(known), verdict(known, source_ip="192.0.2.1")
    assert (near.allow, near.source_ip) == (True, "10.0.0.1")
    assert (far.allow, far.source_ip) == (False, "192.0.2.1")
    assert verdict(known, source_ip="").reason == "source_address_needed"


def test_a_clause_on_source_addresses_elsewhere_does_not_matter() -> None:
    other = policy("net", Action.ALLOW, from_net("10.0.0.0/24"), namespace="away")
    tried = policy("try", Action.ALLOW, from_net("10.0.0.0/24"), dry_run=True)
    assert verdict(world(other, tried)).source_ip == ""
