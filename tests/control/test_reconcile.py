"""The control plane's decisions: when STRICT applies, what statuses say, where the trust bundle goes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ambient.control.dump import plain
from ambient.control.reconcile import Reconciler
from ambient.control.statuses import RootWrite
from ambient.control.strict_delay import StrictDelay
from ambient.manifest import kinds
from ambient.manifest.kinds import Changed
from ambient.manifest.mesh import Mesh
from ambient.manifest.peer_authentication import is_strict
from ambient.manifest.problems import Problem
from ambient.model.address import parse_ip
from ambient.model.policy import Action, Scope
from ambient.model.workload import TunnelProtocol, Workload
from ambient.model.world import World

UID = "Kubernetes//Pod/shop/web"
STRICT = "istio-system/istio_converted_static_strict"


def meta(name: str, namespace: str = "shop", **more: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": namespace} | more}


def pod(hbone: bool, ip: str = "10.1.0.1", name: str = "web", **labels: str) -> Any:
    annotations = {"ambient.istio.io/redirection": "enabled"} if hbone else {}
    status = {"phase": "Running", "podIPs": [{"ip": ip}]}
    return kinds.POD.convert(
        meta(name, annotations=annotations, labels=labels) | {"status": status, "spec": {"nodeName": "n1"}}
    )


def peer(mode: str) -> Any:
    return kinds.PEER_AUTHENTICATION.convert(meta("default") | {"spec": {"mtls": {"mode": mode}}})


def policy(name: str = "p", generation: int = 1, conditions: Any = None, **spec: Any) -> Any:
    value = meta(name, generation=generation) | {"spec": spec}
    if conditions is not None:
        value["status"] = {"conditions": conditions}
    return kinds.AUTHORIZATION_POLICY.convert(value)


class Plane:
    """A reconciler with a clock, and subscribers that acknowledge when told to."""

    def __init__(self, *objects: Any, timeout_s: float = 5.0) -> None:
        self.reconciler = Reconciler(Mesh(), timeout_s)
        self.now = 1000.0
        self.known: dict[tuple[str, str], Any] = {}
        self.waiting: dict[str, tuple[str, ...]] = {}
        """uid -> nodes that have not acknowledged."""
        self.behind: dict[str, tuple[str, ...]] = {}
        """uid -> nodes that do not have its present form."""
        self.put(*objects)

    def put(self, *objects: Any) -> None:
        for item in objects:
            self.change(item, item)
        self.publish()

    def remove(self, item: Any) -> None:
        self.change(item, None)
        self.publish()

    def change(self, item: Any, new: Any) -> None:
        kind = kinds.KINDS[type(item).__name__]
        old = self.known.pop((kind.name, item.key), None)
        if new is not None:
            self.known[kind.name, item.key] = new
        if old is not None or new is not None:
            self.reconciler.change(Changed(kind, item.key, old, new))

    def publish(self) -> None:
        self.reconciler.publish(self.now)
        self.release()

    def release(self) -> None:
        self.reconciler.release(self.now, lambda uid: self.waiting.get(uid, ()), lambda uid: self.behind.get(uid, ()))

    def workload(self, uid: str = UID) -> Workload:
        assert self.reconciler.world is not None
        return self.reconciler.world.workloads[uid]


def test_a_pod_that_joins_is_strict_only_once_everybody_acknowledged() -> None:
    plane = Plane(peer("STRICT"), pod(False))
    assert plane.workload().policies == ()
    plane.waiting[UID] = ("n1", "n2")
    plane.put(pod(True))
    assert plane.workload().enrolled and plane.workload().policies == ()
    plane.waiting[UID] = ("n2",)
    plane.release()
    assert plane.workload().policies == () and plane.reconciler.delay.waiting == (UID,)
    plane.waiting[UID] = ()
    plane.release()
    assert plane.workload().enrolled and plane.workload().policies == (STRICT,)
    assert plane.reconciler.delay.timeouts_total == 0 and plane.reconciler.delay.next_deadline is None


def test_a_subscriber_that_never_acknowledges_delays_for_the_timeout_and_is_counted() -> None:
    plane = Plane(peer("STRICT"), pod(False))
    plane.waiting[UID] = ("n2",)
    plane.put(pod(True))
    assert plane.reconciler.delay.next_deadline == 1005.0
    plane.now = 1004.9
    plane.release()
    assert plane.workload().policies == ()
    plane.now = 1005.0
    plane.release()
    assert plane.workload().policies == (STRICT,) and plane.reconciler.delay.timeouts_total == 1


def test_without_subscribers_it_is_strict_at_once() -> None:
    plane = Plane(peer("STRICT"), pod(False))
    plane.put(pod(True))
    assert plane.workload().policies == (STRICT,)


def test_a_pod_that_leaves_loses_strict_with_hbone() -> None:
    plane = Plane(peer("STRICT"), pod(False))
    plane.put(pod(True))
    plane.put(pod(False))
    assert not plane.workload().enrolled and plane.workload().policies == ()


def test_a_pod_that_leaves_while_it_waits_waits_no_more() -> None:
    plane = Plane(peer("STRICT"), pod(False))
    plane.waiting[UID] = ("n2",)
    plane.put(pod(True))
    plane.put(pod(False))
    plane.now += 10
    plane.release()
    assert plane.workload().policies == () and plane.reconciler.delay.timeouts_total == 0
    plane.put(pod(True))
    assert plane.workload().policies == ()  # and waits anew
    plane.remove(pod(True))
    assert plane.reconciler.delay.waiting == ()


def test_what_was_hbone_when_we_started_is_strict_at_once() -> None:
    reconciler = Reconciler(Mesh(), 5.0)
    for item in (peer("STRICT"), pod(True)):
        reconciler.change(Changed(kinds.KINDS[type(item).__name__], item.key, None, item))
    assert reconciler.publish(0.0).workloads[UID].policies == (STRICT,)


def test_strict_for_a_namespace_reaches_long_enrolled_pods_at_once() -> None:
    plane = Plane(pod(True))
    plane.waiting[UID] = ("n2",)
    plane.put(peer("STRICT"))
    assert plane.workload().policies == (STRICT,)


def test_a_new_pod_under_an_old_name_waits_although_the_old_one_was_known() -> None:
    plane = Plane(peer("STRICT"), pod(True, "10.1.0.1"))
    plane.waiting[UID] = ("n2",)
    plane.put(pod(True, "10.1.0.2"))
    assert plane.workload().policies == ()


def test_other_changes_of_a_waiting_pod_do_not_end_or_restart_the_wait() -> None:
    plane = Plane(peer("STRICT"), pod(False))
    plane.waiting[UID] = ("n2",)
    plane.put(pod(True))
    plane.now = 1003.0
    plane.put(pod(True, version="v2"))
    assert plane.workload().canonical_revision == "v2" and plane.workload().policies == ()
    assert plane.reconciler.delay.next_deadline == 1005.0
    plane.now = 1005.0
    plane.release()
    assert plane.workload().canonical_revision == "v2" and plane.workload().policies == (STRICT,)


def test_other_policies_are_never_delayed() -> None:
    select = {"selector": {"matchLabels": {"app": "web"}}}
    plane = Plane(peer("STRICT"), policy(**select), pod(False, app="web"))
    plane.waiting[UID] = ("n2",)
    plane.put(pod(True, app="web"))
    assert plane.workload().policies == ("shop/p",)
    plane.waiting.clear()
    plane.release()
    assert plane.workload().policies == (STRICT, "shop/p")


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["hbone", "plain", "strict", "permissive", "ack", "silent", "time", "gone"]),
            st.sampled_from(["web", "db"]),
        ),
        max_size=30,
    )
)
def test_strict_is_listed_by_no_plain_pod_and_at_the_latest_after_the_timeout(steps: list[tuple[str, str]]) -> None:
    plane = Plane()
    ips = {"web": "10.1.0.1", "db": "10.1.0.2"}
    wanted_strict = False
    for step, name in steps:
        uid = f"Kubernetes//Pod/shop/{name}"
        match step:
            case "hbone" | "plain":
                plane.put(pod(step == "hbone", ips[name], name))
            case "strict" | "permissive":
                wanted_strict = step == "strict"
                plane.put(peer(step.upper()))
            case "ack":
                plane.waiting.pop(uid, None)
                plane.release()
            case "silent":
                plane.waiting[uid] = ("n2",)
            case "time":
                plane.now += 5.0
                plane.release()
            case "gone":
                plane.remove(pod(False, ips[name], name))
        assert plane.reconciler.world is not None
        for workload in plane.reconciler.world.workloads.values():
            strict = any(is_strict(key) for key in workload.policies)
            waits = workload.uid in plane.reconciler.delay.waiting
            assert strict == (workload.enrolled and wanted_strict and not waits)
            if waits:
                assert plane.waiting.get(workload.uid)
    plane.now += 5.0
    plane.release()
    assert plane.reconciler.delay.waiting == ()


# -- statuses

NOW = "2026-03-04T05:06:07Z"


def patches(plane: Plane) -> list[Any]:
    return list(plane.reconciler.status_patches(NOW))


def test_an_enforced_policy_is_accepted() -> None:
    [patch] = patches(Plane(policy(generation=3, rules=[{}])))
    assert (patch.namespace, patch.name) == ("shop", "p")
    assert patch.conditions == (
        {
            "type": "ZtunnelAccepted",
            "status": "True",
            "reason": "Accepted",
            "message": "attached to ztunnel",
            "lastTransitionTime": NOW,
            "observedGeneration": "3",
        },
    )


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"action": "CUSTOM"}, "spec.action"),
        ({"rules": [{"to": [{"operation": {"paths": ["/"]}}]}]}, "spec.rules[0].to[0].operation.paths"),
        ({"action": "ALOW"}, "spec.action"),
    ],
)
def test_an_unsupported_one_says_which_field(spec: dict[str, Any], field: str) -> None:
    [patch] = patches(Plane(policy(**spec)))
    [condition] = patch.conditions
    assert (condition["status"], condition["reason"]) == ("False", "UnsupportedValue")
    assert field in condition["message"]


def test_a_status_is_written_once_and_others_conditions_stay() -> None:
    foreign = {"type": "WaypointAccepted", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    plane = Plane(policy(conditions=[foreign], rules=[{}]))
    [patch] = patches(plane)
    assert patch.conditions[0] == foreign
    assert patches(plane) == []
    # our own write comes back as a change, even with a new generation
    plane.put(policy(generation=2, conditions=list(patch.conditions), rules=[{}]))
    assert patches(plane) == []


@pytest.mark.parametrize(
    "status", ["x", [], {"conditions": "x"}, {"conditions": [5, {"type": "Other", "message": None}]}]
)
def test_a_status_of_any_shape_does_not_keep_the_policy_from_being_read(status: Any) -> None:
    value = {
        "metadata": {"name": "p", "namespace": "shop"},
        "spec": {"action": "DENY", "rules": [{}]},
        "status": status,
    }
    item = kinds.AUTHORIZATION_POLICY.decode(json.dumps(value).encode())
    plane = Plane(item)
    assert plane.reconciler.publish(plane.now).policies["shop/p"].action is Action.DENY
    [patch] = patches(plane)
    foreign = status["conditions"] if isinstance(status, dict) and isinstance(status["conditions"], list) else []
    assert list(patch.conditions[:-1]) == foreign and patch.conditions[-1]["type"] == "ZtunnelAccepted"


def test_a_message_that_changes_keeps_the_time_and_a_status_that_changes_takes_the_new_one() -> None:
    old = "2026-01-01T00:00:00Z"
    condition = {"type": "ZtunnelAccepted", "status": "False", "reason": "UnsupportedValue", "message": "old"}
    before = [condition | {"lastTransitionTime": old}]
    [patch] = patches(Plane(policy(conditions=before, action="CUSTOM")))
    assert patch.conditions[0]["lastTransitionTime"] == old
    [patch] = patches(Plane(policy(conditions=before, rules=[{}])))
    assert patch.conditions[0]["lastTransitionTime"] == NOW


def test_a_policy_for_waypoints_gets_no_condition_and_loses_an_old_one() -> None:
    spec = {"targetRefs": [{"kind": "Gateway", "name": "w"}]}
    assert patches(Plane(policy(**spec))) == []
    ours = {"type": "ZtunnelAccepted", "status": "True", "reason": "Accepted", "message": "attached to ztunnel"}
    [patch] = patches(Plane(policy(conditions=[ours], **spec)))
    assert patch.conditions == ()


def test_a_failed_write_is_offered_again_unless_the_policy_is_gone() -> None:
    plane = Plane(policy(rules=[{}]))
    assert len(patches(plane)) == 1
    plane.reconciler.retry_status("shop", "p")
    assert len(patches(plane)) == 1
    plane.reconciler.retry_status("shop", "p")
    plane.remove(policy())
    assert patches(plane) == []


# -- the trust bundle


def namespace(name: str, **more: Any) -> Any:
    return kinds.NAMESPACE.convert({"metadata": {"name": name} | more})


def bundle(namespace_name: str, text: str, name: str = "istio-ca-root-cert") -> Any:
    return kinds.CONFIG_MAP.convert(meta(name, namespace_name) | {"data": {"root-cert.pem": text}})


def test_the_bundle_goes_where_it_is_missing_or_wrong() -> None:
    plane = Plane(namespace("a"), namespace("b"), namespace("c"), bundle("b", "old"), bundle("c", "new"))
    assert plane.reconciler.root_writes("new") == (RootWrite("a", True, "new"), RootWrite("b", False, "new"))
    assert [w.namespace for w in plane.reconciler.root_writes("newer")] == ["a", "b", "c"]


def test_other_config_maps_and_ending_namespaces_are_left_alone() -> None:
    plane = Plane(namespace("a", deletionTimestamp=NOW), namespace("b"), bundle("b", "x"), bundle("b", "y", "other"))
    assert plane.reconciler.root_writes("x") == ()
    plane.remove(bundle("b", "x"))
    assert plane.reconciler.root_writes("x") == (RootWrite("b", True, "x"),)
    plane.remove(namespace("b"))
    assert plane.reconciler.root_writes("x") == ()


# -- what others ask


def test_the_pods_of_a_node_are_known_ended_ones_too() -> None:
    plane = Plane(pod(True), pod(False, "10.1.0.2", "db"))
    assert sorted(p.name for p in plane.reconciler.pods_on("n1")) == ["db", "web"]
    plane.remove(pod(True))
    assert [p.name for p in plane.reconciler.pods_on("n1")] == ["db"]
    assert plane.reconciler.pods_on("n2") == ()


def test_an_object_that_does_not_decode_is_among_the_problems_until_it_does() -> None:
    plane = Plane()
    problem = Problem("Pod shop/web", "spec", "Expected `object`")
    plane.reconciler.unreadable("Pod", "shop/web", problem)
    assert plane.reconciler.problems == (problem,)
    plane.reconciler.unreadable("Pod", "shop/web", None)
    assert plane.reconciler.problems == ()


def test_a_policy_that_never_decoded_stands_closed_until_it_does_or_is_gone() -> None:
    plane = Plane(pod(True))

    def told(problem: Problem | None) -> World:
        for kind in ("AuthorizationPolicy", "PeerAuthentication"):
            plane.reconciler.unreadable(kind, "shop/p", problem)
        return plane.reconciler.publish(plane.now)

    world = told(problem := Problem("AuthorizationPolicy shop/p", "metadata", "is nested too deeply"))
    assert (world.policies["shop/p"].action, world.policies["shop/p"].groups) == (Action.ALLOW, ())
    assert world.policies["shop/p"].scope is Scope.NAMESPACE and world.workloads[UID].policies == (STRICT,)
    assert plane.reconciler.problems == (problem, problem)
    world = told(None)  # gone
    assert "shop/p" not in world.policies and world.workloads[UID].policies == ()
    assert plane.reconciler.problems == ()


def test_a_policy_that_does_not_decode_any_more_stays_as_it_was() -> None:
    plane = Plane(policy(action="DENY", rules=[{}]))
    before = plane.reconciler.publish(plane.now).policies["shop/p"]
    plane.reconciler.unreadable("AuthorizationPolicy", "shop/p", Problem("p", "spec", "bad"))
    assert plane.reconciler.publish(plane.now).policies["shop/p"] == before
    plane.reconciler.unreadable("AuthorizationPolicy", "shop/p", None)
    assert plane.reconciler.publish(plane.now).policies["shop/p"] == before


def test_the_world_is_shown_in_words() -> None:
    plane = Plane(pod(True))
    shown = plain(plane.reconciler.world)
    assert shown["workloads"][UID]["protocol"] == "HBONE"
    assert shown["workloads"][UID]["addresses"] == ["10.1.0.1"]
    assert shown["policies"][STRICT]["groups"][0]["rules"][0]["matches"][0]["not_principals"][0]["kind"] == "PRESENCE"
    assert "_by_address" not in shown


def test_the_delay_alone_admits_a_plain_workload_without_strict() -> None:
    delay = StrictDelay(5.0)
    workload = Workload(UID, "web", "shop", (parse_ip("10.1.0.1"),), policies=(STRICT, "shop/p"))
    assert delay.admit(workload, None, 0.0, first=True).policies == ("shop/p",)
    assert workload.protocol is TunnelProtocol.NONE


def nobody(_: str) -> tuple[str, ...]:
    return ()


def test_strict_goes_before_peers_hear_that_the_pod_is_reached_in_plaintext() -> None:
    delay = StrictDelay(5.0)
    addresses = (parse_ip("10.1.0.1"),)
    strict = Workload(UID, "web", "shop", addresses, protocol=TunnelProtocol.HBONE, policies=(STRICT,))
    plain_form = dataclasses.replace(strict, protocol=TunnelProtocol.NONE)
    first = delay.admit(plain_form, strict, 100.0, first=False)
    assert first.enrolled and first.policies == ()
    assert delay.release(101.0, nobody, lambda _: ("n2",)) == () and delay.waiting == (UID,)
    # a change meanwhile does not make it wait longer, nor less
    assert delay.admit(plain_form, first, 102.0, first=False) == first and delay.next_deadline == 105.0
    assert delay.release(103.0, nobody, nobody) == (UID,) and delay.timeouts_total == 0
    delay.admit(plain_form, strict, 200.0, first=False)
    assert delay.release(205.0, nobody, lambda _: ("n2",)) == (UID,) and delay.timeouts_total == 1


def test_a_pod_that_comes_back_while_it_leaves_is_strict_at_once_because_everybody_knows_the_way() -> None:
    delay = StrictDelay(5.0)
    addresses = (parse_ip("10.1.0.1"),)
    strict = Workload(UID, "web", "shop", addresses, protocol=TunnelProtocol.HBONE, policies=(STRICT,))
    leaving = delay.admit(dataclasses.replace(strict, protocol=TunnelProtocol.NONE), strict, 100.0, first=False)
    assert delay.admit(strict, leaving, 101.0, first=False) == strict and delay.waiting == ()


def test_a_pod_that_was_not_strict_leaves_at_once() -> None:
    delay = StrictDelay(5.0)
    plain_form = Workload(UID, "web", "shop", (parse_ip("10.1.0.1"),))
    published = dataclasses.replace(plain_form, protocol=TunnelProtocol.HBONE)
    assert delay.admit(plain_form, published, 100.0, first=False) == plain_form and delay.waiting == ()


def test_strict_comes_a_moment_after_the_last_acknowledgement_but_never_after_the_timeout() -> None:
    delay = StrictDelay(5.0, settle_s=1.0)
    addresses = (parse_ip("10.1.0.1"),)
    workload = Workload(UID, "web", "shop", addresses, protocol=TunnelProtocol.HBONE, policies=(STRICT,))
    assert delay.admit(workload, None, 100.0, first=False).policies == ()
    assert delay.release(101.0, lambda _: (), nobody) == () and delay.next_deadline == 102.0
    assert delay.release(101.5, lambda _: ("late",), nobody) == ()
    assert delay.release(102.0, lambda _: (), nobody) == (workload.uid,)
    delay.admit(workload, None, 200.0, first=False)
    assert delay.release(204.7, lambda _: (), nobody) == () and delay.next_deadline == 205.0
    assert delay.release(205.0, lambda _: (), nobody) == (workload.uid,)
    assert delay.timeouts_total == 0
