"""`ambient why`: from entries and answers to steps and a path; the decisions themselves are tested elsewhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ambient.cli.why import behind, find_source, resolve, split_destination
from ambient.datapath.decide import Candidate
from ambient.datapath.explain import Arrival, Facts, Kernel, Source, explain, touching
from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import EnrolledValue, ServiceValue, SettingsValue, VerdictValue, WorkloadValue
from ambient.errors import Misuse

NOW = 10**12
ENROLLED = LAYOUT["WORKLOAD_ENROLLED"]
SOURCE = Source("node1", "shop/a", "uid-a", "enrolled", "", "", 77, ("10.0.0.1",))
SETTINGS = SettingsValue(complete=1, heartbeat_ns=NOW)
KERNEL = Kernel(SETTINGS, NOW, EnrolledValue("10.0.0.1", "", 1), WorkloadValue(2, ENROLLED, 5), None)
POLICY = {"policy": "shop/p", "action": "deny", "scope": "namespace", "dry_run": False, "matches": True}


def verdict(allow: bool, reason: str = "no_policy", **more: Any) -> dict[str, Any]:
    return {
        "endpoint": "10.0.1.2:8080",
        "identity": "spiffe://cluster.local/ns/shop/sa/a",
        "workload": "c//Pod/shop/b",
        "node": "node2",
        "enrolled": True,
        "policies": [POLICY] if not allow else [],
        "allow": allow,
        "policy": "" if allow else "shop/p",
        "reason": reason,
    } | more


def hop(endpoint: str = "10.0.1.2:8080", tunnel: bool = True) -> dict[str, Any]:
    return {"endpoint": endpoint, "authority": endpoint if tunnel else ""}


def answer(kind: str = "hbone", hops: Any = None, verdicts: Any = None, **more: Any) -> dict[str, Any]:
    route = {"kind": kind, "hops": hops if hops is not None else [hop()], "service": "", "reason": "", "message": ""}
    return {"synced": True, "route": route | more, "verdicts": verdicts if verdicts is not None else [verdict(True)]}


def arrival(found: dict[str, Any] | None, there: Kernel | None = None) -> Arrival:
    return Arrival("10.0.1.2:8080", found, there)


FACTS = Facts(SOURCE, "10.0.1.2", 8080, KERNEL, answer(), arrival(verdict(True)))


def ended(facts: Facts) -> tuple[str, bool | None]:
    outcome = explain(facts)
    assert outcome.steps[-1]["step"] == "path"
    return outcome.path, outcome.allowed


def test_a_tunnel_is_explained_from_the_hook_to_the_policies() -> None:
    outcome = explain(FACTS)
    assert (outcome.path, outcome.allowed) == ("ztunnel", True)
    assert [row["step"] for row in outcome.steps] == ["source", "connect", "route", "authorize", "path"]
    assert outcome.steps[1]["result"] == "captured" and "enrolled" in outcome.steps[1]["why"]


def test_a_denial_names_the_policy_that_matched() -> None:
    outcome = explain(replace(FACTS, answer=answer(verdicts=[verdict(False, "policy")])))
    assert (outcome.path, outcome.allowed) == ("refused", False)
    assert any(row["step"] == "policy" and "deny shop/p matches" in row["result"] for row in outcome.steps)
    assert "policy shop/p" in outcome.detail


def test_endpoints_that_disagree_leave_it_open() -> None:
    both = [verdict(True), verdict(False, "default_deny", endpoint="10.0.1.3:8080")]
    facts = replace(FACTS, answer=answer(hops=[hop(), hop("10.0.1.3:8080")], verdicts=both))
    assert ended(facts) == ("ztunnel", None)


def test_what_ztunnel_refuses_or_passes_in_plaintext_is_said() -> None:
    refused = answer("refused", [], [], reason="no_endpoint", message="service x has no healthy endpoint")
    assert ended(replace(FACTS, answer=refused)) == ("refused", False)
    assert "no healthy endpoint" in explain(replace(FACTS, answer=refused)).detail
    assert ended(replace(FACTS, answer=answer("tcp", [hop(tunnel=False)], []))) == ("ztunnel", True)
    unknown = explain(replace(FACTS, answer=None))
    assert (unknown.path, unknown.allowed, unknown.known) == ("ztunnel", None, False)
    assert unknown.steps[-1]["why"].startswith("unknown: ") and explain(FACTS).known


@pytest.mark.parametrize(
    ("change", "path", "allowed"),
    [
        ({"workload": None}, "plain", True),  # nobody of the mesh
        ({"settings": replace(SETTINGS, complete=0), "workload": None}, "ztunnel", True),
        ({"settings": replace(SETTINGS, mode=1)}, "plain", True),
        ({"enrolled": replace(KERNEL.enrolled, flows=9, flows_max=9)}, "refused", False),
        ({"service": ServiceValue(3, 0), "workload": None}, "ztunnel", True),
    ],
)
def test_the_hook_decides_over_what_the_kernel_holds(change: dict[str, Any], path: str, allowed: bool) -> None:
    plain = arrival(verdict(True, enrolled=False, identity=""))
    assert ended(replace(FACTS, kernel=replace(KERNEL, **change), plain=plain)) == (path, allowed)


def test_ports_of_the_mesh_and_dns_have_their_own_ends() -> None:
    assert ended(replace(FACTS, port=15008)) == ("refused", False)
    assert ended(replace(FACTS, port=53)) == ("dns", True)


def test_a_pod_outside_the_mesh_meets_the_destinations_ztunnel_in_plaintext() -> None:
    outside = replace(KERNEL, enrolled=None)
    source = replace(SOURCE, state="refused", reason="host_network", detail="uses the host's network")
    strict = verdict(False, "strict", identity="", policy="istio-system/s")
    facts = replace(FACTS, source=source, kernel=outside, answer=None, plain=arrival(strict))
    outcome = explain(facts)
    assert (outcome.path, outcome.allowed) == ("refused", False) and "STRICT" in outcome.detail
    assert "host_network" in outcome.steps[0]["result"] and "host's network" in outcome.steps[0]["why"]
    assert ended(replace(facts, plain=arrival(verdict(True, identity="")))) == ("ztunnel", True)
    unasked = replace(facts, source=replace(source, state="not_enrolled", reason="", detail=""))
    assert "istio.io/dataplane-mode" in explain(unasked).steps[0]["why"] and explain(FACTS).steps[0]["why"] == ""
    assert ended(replace(facts, plain=arrival(verdict(True, enrolled=False)))) == ("plain", True)
    # bypassed at the destination, too: nobody takes the plaintext
    workload = WorkloadValue(2, ENROLLED | LAYOUT["WORKLOAD_BYPASS"], 5)
    assert ended(replace(facts, plain=arrival(strict, replace(outside, workload=workload)))) == ("plain", True)
    captured = replace(facts, kernel=replace(outside, workload=workload), plain=arrival(strict, outside))
    assert ended(captured) == ("refused", False)


DIRECT = LAYOUT["ENROLLED_DIRECT"], LAYOUT["WORKLOAD_DIRECT"]
REDIRECT = LAYOUT["ENROLLED_REDIRECT"], LAYOUT["WORKLOAD_REDIRECT"]
HERE = ENROLLED | LAYOUT["WORKLOAD_LOCAL"]


def within(
    ours: int, theirs: int, verdict: VerdictValue | None = None, can: int = 0, generation: int = 5
) -> tuple[Facts, Candidate]:
    there = WorkloadValue(2, HERE | theirs, generation)
    candidate = Candidate("10.0.1.2", 8080, there, verdict)
    enrolled = EnrolledValue("10.0.0.1", "", 1, flags=ours, identity=9)
    held = replace(
        KERNEL,
        enrolled=enrolled,
        workload=there,
        candidates=(candidate,),
        policies={4: "shop/p"},
        settings=replace(SETTINGS, acceleration=can),
    )
    return replace(FACTS, kernel=held), candidate


ANY = LAYOUT["WORKLOAD_ALLOW_ANY"]


@pytest.mark.parametrize(
    ("facts", "path", "reason"),
    [
        (within(DIRECT[0], DIRECT[1] | ANY), "direct", "kernel"),
        (within(REDIRECT[0], REDIRECT[1] | ANY, can=1), "redirect", "kernel"),
        (within(REDIRECT[0], REDIRECT[1] | ANY), "direct", "kernel"),  # this kernel cannot
        (within(REDIRECT[0], DIRECT[1] | ANY, can=1), "direct", "kernel"),  # the stricter wins
        (within(DIRECT[0], LAYOUT["WORKLOAD_OFF"] | ANY), "ztunnel", "acceleration_off"),
        (within(DIRECT[0], DIRECT[1] | ANY, can=LAYOUT["NO_DESTROY"]), "ztunnel", "acceleration_off"),
        (within(DIRECT[0], DIRECT[1]), "ztunnel", "no_verdict"),
        (within(DIRECT[0], DIRECT[1], VerdictValue(5, 1, 4)), "direct", "kernel"),
        (within(DIRECT[0], DIRECT[1], VerdictValue(4, 1, 4)), "ztunnel", "stale_verdict"),
        (within(DIRECT[0], DIRECT[1], VerdictValue(5, 0, 4)), "ztunnel", "verdict_denies"),
        (within(DIRECT[0], DIRECT[1] | LAYOUT["WORKLOAD_WAYPOINT"] | ANY), "ztunnel", "captured"),
    ],
)
def test_the_path_within_a_node_is_that_of_verdict_and_acceleration(
    facts: tuple[Facts, Candidate], path: str, reason: str
) -> None:
    outcome = explain(facts[0])
    (step,) = [row for row in outcome.steps if row["step"] == "same node"]
    assert step["result"] == f"10.0.1.2:8080: {reason}, {path}"
    assert (outcome.path, outcome.allowed) == (path, True)
    assert ("shop/p" in step["why"]) is (facts[1].verdict is not None)
    cannot_close = bool(facts[0].kernel.settings.acceleration & LAYOUT["NO_DESTROY"])
    assert ("SOCK_DESTROY" in step["why"]) is cannot_close


def test_what_allows_a_connection_and_an_agent_that_is_silent_are_told() -> None:
    facts, _ = within(DIRECT[0], DIRECT[1] | ANY)
    assert "no policy selects the destination" in explain(facts).steps[2]["why"]
    judged, _ = within(DIRECT[0], DIRECT[1], VerdictValue(5, 1, 4))
    assert "its verdict allows the connection; policy shop/p" in explain(judged).steps[2]["why"]
    for silent_s, path in ((15, "direct"), (16, "ztunnel")):
        settings = replace(SETTINGS, heartbeat_ns=NOW - silent_s * 10**9)
        outcome = explain(replace(facts, kernel=replace(facts.kernel, settings=settings)))
        assert outcome.path == path
        assert ("last heard of 16 s ago" in outcome.steps[2]["why"]) is (silent_s == 16)


def test_a_service_with_endpoints_here_and_elsewhere_goes_both_ways() -> None:
    facts, here = within(DIRECT[0], DIRECT[1] | ANY)
    away = Candidate("10.0.2.2", 8080, WorkloadValue(3, ENROLLED, 5))
    mixed = replace(facts, kernel=replace(facts.kernel, candidates=(here, away, here)))
    outcome = explain(mixed)
    assert (outcome.path, outcome.allowed) == ("ztunnel", True)
    assert "direct to 10.0.1.2:8080" in outcome.detail and "ztunnel to 10.0.2.2:8080" in outcome.detail
    assert len([row for row in outcome.steps if row["step"] == "same node"]) == 2
    assert len([row for row in outcome.steps if row["step"] == "path"]) == 1
    (connect,) = [row for row in outcome.steps if row["step"] == "connect"]
    assert "else to ztunnel" in connect["why"]  # only the next steps know which
    assert "else" not in explain(FACTS).steps[1]["why"]


def test_a_client_outside_the_mesh_that_dials_a_service_meets_the_policies_of_each_endpoint() -> None:
    denied = verdict(False, "default_deny", identity="")
    facts = replace(FACTS, kernel=replace(KERNEL, enrolled=None), answer=None, behind=[arrival(denied)])
    outcome = explain(facts)
    assert (outcome.path, outcome.allowed) == ("refused", False) and "ALLOW policies" in outcome.detail
    assert [row["step"] for row in outcome.steps] == ["source", "connect", "policy", "authorize", "path"]
    assert ended(replace(facts, behind=[arrival(verdict(True, identity=""))])) == ("ztunnel", True)
    assert ended(replace(facts, behind=[])) == ("refused", False)
    assert ended(replace(facts, behind=[arrival(verdict(True, enrolled=False))])) == ("plain", True)
    other = Arrival("10.0.1.3:8080", verdict(True, enrolled=False))
    both = explain(replace(facts, behind=[arrival(denied), other]))
    assert (both.path, both.allowed) == ("plain", None)
    assert "refused to 10.0.1.2:8080; plain to 10.0.1.3:8080" in both.detail


def test_a_port_nobody_listens_on_is_told_unless_it_is_refused_before() -> None:
    facts = replace(FACTS, deaf={"10.0.1.2:8080": "node2"})
    outcome = explain(facts)
    assert outcome.allowed and outcome.steps[-2]["result"] == "10.0.1.2:8080: nobody listens"
    assert outcome.steps[-2]["where"] == "node2 kernel"
    refused = explain(replace(facts, answer=answer(verdicts=[verdict(False, "policy")])))
    assert not [row for row in refused.steps if row["step"] == "listen"]


def test_a_policy_that_does_not_match_is_not_said_to_select_nothing() -> None:
    passed = verdict(True, policies=[{**POLICY, "matches": False}])
    outcome = explain(replace(FACTS, answer=answer(verdicts=[passed])))
    assert "none denies it" in outcome.detail and "no policy selects" not in outcome.detail


def test_loopback_stays_within_the_pod() -> None:
    outcome = explain(replace(FACTS, address="127.0.0.1"))
    assert (outcome.path, outcome.allowed) == ("plain", True) and "within the pod" in outcome.detail


def test_drift_is_told_as_what_the_kernel_holds_and_the_control_plane_says() -> None:
    row = {
        "node": "node1",
        "map": "workloads",
        "key": "10.0.1.2",
        "drift": "differs",
        "wanted": {"flags": ["enrolled"], "workload": 2},
        "actual": {"flags": [], "workload": 2},
    }
    other = {**row, "key": "10.0.1.9"}
    assert touching([row, other], 77, "10.0.1.2", 8080, []) == [row]
    slot = {**row, "map": "endpoints", "key": "shop/b:80 slot 0"}
    assert touching([slot, other], 77, "10.0.1.2", 8080, [], [("endpoints", "shop/b:80 slot 0")]) == [slot]
    (step,) = [s for s in explain(replace(FACTS, drift=[row])).steps if s["step"] == "drift"]
    assert step["why"] == "the kernel holds flags=[] while the control plane says flags=['enrolled']"
    missing = explain(replace(FACTS, drift=[{**row, "actual": {}}])).steps[1]["why"]
    assert missing == "the kernel holds nothing while the control plane says there is an entry"


def test_a_missing_listener_at_the_destination_is_a_step() -> None:
    outcome = explain(replace(FACTS, listening={"10.0.1.2": False}))
    assert [s["result"] for s in outcome.steps if s["step"] == "admit"] == ["no HBONE listener"]
    assert (outcome.path, outcome.allowed) == ("refused", False) and "node2" in outcome.detail
    two = answer(hops=[hop(), hop("10.0.1.3:8080")], verdicts=[verdict(True), verdict(True, endpoint="10.0.1.3:8080")])
    assert ended(replace(FACTS, answer=two, listening={"10.0.1.2": False})) == ("ztunnel", None)
    assert not [s for s in explain(replace(FACTS, listening={"10.0.1.2": True})).steps if s["step"] == "admit"]


def test_destinations_are_read_and_wrong_ones_refused() -> None:
    assert split_destination("catalog:80") == ("catalog", 80)
    assert split_destination("[fd00::1]:80") == ("fd00::1", 80)
    for wrong in ("catalog", "catalog:", ":80", "catalog:http", "catalog:0", "catalog:65536"):
        with pytest.raises(Misuse, match="HOST:PORT"):
            split_destination(wrong)


DUMP: dict[str, Any] = {
    "services": [
        {
            "name": "web",
            "namespace": "shop",
            "hostname": "web.shop.svc.cluster.local",
            "vips": ["/10.96.0.1", "/fd00:96::1"],
            "ports": {"80": 8080},
            "endpoints": {},
        },
        {
            "name": "headless",
            "namespace": "shop",
            "hostname": "headless.shop.svc.cluster.local",
            "vips": [],
            "ports": {"80": 80},
            "endpoints": {"w": {"workloadUid": "uid//Pod/b"}},
        },
    ],
    "workloads": [{"uid": "uid//Pod/b", "namespace": "shop", "name": "b", "workloadIps": ["fd00::2", "10.0.1.2"]}],
}


@pytest.mark.parametrize(
    ("host", "family", "address"),
    [
        ("10.9.9.9", 0, "10.9.9.9"),
        ("::ffff:10.9.9.9", 0, "10.9.9.9"),
        ("web", 0, "10.96.0.1"),
        ("web.shop", 6, "fd00:96::1"),
        ("web.shop.svc.cluster.local", 0, "10.96.0.1"),
        ("shop/web", 0, "10.96.0.1"),
        ("headless", 0, "10.0.1.2"),
        ("shop/b", 6, "fd00::2"),
    ],
)
def test_names_are_what_the_pod_would_reach(host: str, family: int, address: str) -> None:
    assert resolve(host, 80, "shop", DUMP, family)[0] == address


def test_an_address_is_told_whose_it_is_and_a_service_which_endpoints_it_has() -> None:
    assert resolve("10.96.0.1", 81, "shop", DUMP, 0) == ("10.96.0.1", "VIP of service shop/web")
    assert resolve("fd00::2", 80, "shop", DUMP, 6) == ("fd00::2", "address of pod shop/b")
    assert resolve("10.9.9.9", 80, "shop", DUMP, 4) == ("10.9.9.9", "address")
    with pytest.raises(Misuse, match="no IPv6 address"):
        resolve("10.9.9.9", 80, "shop", DUMP, 6)
    ends = {
        "w": {"workloadUid": "uid//Pod/b", "status": "Healthy", "port": {"80": 8080}},
        "x": {"workloadUid": "uid-x", "status": "Unhealthy", "port": {"80": 8080}},
    }
    dump = {**DUMP, "services": [{**DUMP["services"][0], "endpoints": ends}]}
    assert behind("10.96.0.1", 80, dump) == [("10.0.1.2", 8080)]
    assert behind("fd00:96::1", 80, dump) == [("fd00::2", 8080)]
    assert behind("10.96.0.1", 80, DUMP) == []
    assert behind("10.96.0.1", 81, dump) is None and behind("10.0.1.2", 8080, dump) is None


@pytest.mark.parametrize("host", ["web.other", "nothing", "other/b", "example.com"])
def test_a_name_nobody_knows_is_refused(host: str) -> None:
    with pytest.raises(Misuse, match="neither an address nor"):
        resolve(host, 80, "shop", DUMP, 0)


def test_the_source_is_a_pod_or_one_of_a_deployment() -> None:
    def row(name: str) -> dict[str, Any]:
        known = {"namespace": "shop", "uid": f"uid-{name}", "state": "enrolled", "reason": "", "detail": ""}
        return {**known, "name": name, "netns_cookie": 1, "addresses": ["10.0.0.7"] if name == "web" else []}

    statuses = {"node1": {"pods": [row("web-7f-x"), row("web-7f-a")]}, "node2": {"pods": [row("web")]}}
    assert find_source("shop/web", statuses).node == "node2"
    assert find_source("shop/web-7f", statuses).name == "shop/web-7f-a"
    with pytest.raises(Misuse, match="no agent here knows"):
        find_source("shop/we", statuses)
    with pytest.raises(Misuse, match="NAMESPACE/POD"):
        find_source("web", statuses)
    assert find_source("10.0.0.7", statuses).name == "shop/web"
    with pytest.raises(Misuse, match="no pod of the nodes looked at"):
        find_source("10.0.0.8", statuses)
    with pytest.raises(Misuse, match="namespaces with pods here: shop"):
        find_source("deploy/web", statuses)
    many = {"node1": {"pods": [row(f"p{number:02}") for number in range(12)]}}
    with pytest.raises(Misuse, match="p08, p09 and 2 more"):
        find_source("shop/we", many)
