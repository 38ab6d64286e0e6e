"""Who may have which identity, and for how long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambient.control.certificates import (
    BACKDATE_S,
    LIFETIME_MIN_S,
    Caller,
    Granted,
    PodFacts,
    Refused,
    Rules,
    Validity,
    authorize,
    renew_at,
    validity,
)

RULES = Rules("cluster.local", ("ambient-system/ambient-node",))
NODE_POD = PodFacts("uid-node", "ambient-node-x", "ambient-system", "ambient-node", host_network=True)
NODE = Caller("ambient-system", "ambient-node", "ambient-node-x", "uid-node", "n1")
PODS = {
    "n1": (
        NODE_POD,
        PodFacts("1", "web-1", "shop", "web"),
        PodFacts("2", "job-1", "shop", "job", finished=True),
        PodFacts("3", "host-1", "shop", "host", host_network=True),
    ),
    "n2": (PodFacts("4", "db-1", "shop", "db"), PodFacts("5", "web-2", "shop", "web")),
}


def ask(identity: str, caller: Caller = NODE, rules: Rules = RULES) -> Granted | Refused:
    return authorize(caller, identity, lambda node: PODS.get(node, ()), rules)


def test_a_node_may_have_the_identity_of_a_pod_it_runs() -> None:
    granted = ask("spiffe://cluster.local/ns/shop/sa/web")
    assert isinstance(granted, Granted)
    assert str(granted.identity) == "spiffe://cluster.local/ns/shop/sa/web"
    assert granted.impersonated


@pytest.mark.parametrize(
    ("identity", "reason"),
    [
        ("spiffe://cluster.local/ns/shop/sa/db", "no_pod_on_node"),  # it runs on n2
        ("spiffe://cluster.local/ns/other/sa/web", "no_pod_on_node"),
        ("spiffe://cluster.local/ns/shop/sa/job", "no_pod_on_node"),  # finished
        ("spiffe://cluster.local/ns/shop/sa/host", "host_network"),
        ("spiffe://other.example/ns/shop/sa/web", "foreign_trust_domain"),
        ("spiffe://cluster.local/ns/shop/sa/web/x", "bad_identity"),
        ("cluster.local/ns/shop/sa/web", "bad_identity"),
        ("spiffe://cluster.local/ns/shop/sa/..", "bad_identity"),
    ],
)
def test_a_node_may_have_no_other(identity: str, reason: str) -> None:
    refused = ask(identity)
    assert isinstance(refused, Refused)
    assert refused.reason == reason
    assert refused.message


WEB = Caller("shop", "web", "web-1", "1", "n1")


def test_anyone_may_have_its_own_identity_and_only_that() -> None:
    for text in ("", "spiffe://cluster.local/ns/shop/sa/web"):
        granted = ask(text, WEB)
        assert isinstance(granted, Granted)
        assert granted.identity.service_account == "web"
        assert not granted.impersonated
    refused = ask("spiffe://cluster.local/ns/ambient-system/sa/ambient-node", WEB)
    assert isinstance(refused, Refused)
    assert refused.reason == "not_a_node_account"


@pytest.mark.parametrize(
    ("caller", "reason"),
    [
        (Caller("ambient-system", "ambient-node"), "token_not_bound"),
        (Caller("ambient-system", "ambient-node", "ambient-node-x", "uid-node"), "token_not_bound"),
        (Caller("ambient-system", "ambient-node", "ambient-node-x", "uid-node", "n2"), "caller_pod_gone"),
        (Caller("ambient-system", "ambient-node", "ambient-node-x", "other-uid", "n1"), "caller_pod_gone"),
        (Caller("ambient-system", "ambient-node", "web-1", "1", "n1"), "caller_pod_gone"),  # pod of another account
        (Caller("shop", "job", "job-1", "2", "n1"), "caller_pod_gone"),  # finished
        (Caller("shop", "a b", "x", "1", "n1"), "bad_caller"),
    ],
)
def test_a_caller_whose_pod_is_not_there_gets_nothing(caller: Caller, reason: str) -> None:
    for identity in ("", "spiffe://cluster.local/ns/shop/sa/web"):
        refused = ask(identity, caller)
        assert isinstance(refused, Refused)
        assert refused.reason == reason


ISSUER = Validity(0, 2_000_000_000)
NOW = 1_700_000_000.5


@pytest.mark.parametrize(("asked", "got"), [(3600, 3600), (0, 86400), (-5, 86400), (10**9, 86400), (1, LIFETIME_MIN_S)])
def test_the_life_is_what_was_asked_for_within_the_limit(asked: int, got: int) -> None:
    life = validity(NOW, asked, 86400, ISSUER)
    assert life is not None
    assert life.not_after == int(NOW) + got


def test_a_certificate_never_outlives_its_issuer_and_an_expiring_issuer_signs_nothing() -> None:
    life = validity(NOW, 86400, 86400, Validity(0, int(NOW) + 100))
    assert life is not None
    assert life.not_after == int(NOW) + 100
    assert validity(NOW, 86400, 86400, Validity(0, int(NOW) + LIFETIME_MIN_S - 1)) is None
    assert validity(NOW, 86400, 86400, Validity(int(NOW) + 10, int(NOW) + 1000)) is None


@given(st.integers(1, 10**6), st.integers(5, 10**6), st.integers(5, 10**6))
def test_half_life_is_always_ahead_and_the_backdating_small(asked: int, limit: int, left: int) -> None:
    now = int(NOW)
    life = validity(NOW, asked, limit, Validity(now - 10**6, now + left))
    assert life is not None
    assert now - BACKDATE_S <= life.not_before <= now < life.not_after <= now + left
    assert renew_at(life) >= now + 0.4 * (life.not_after - now)
