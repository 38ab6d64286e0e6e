"""The controllers' plans as tables, and what the driver makes of them on a store."""

from __future__ import annotations

import asyncio
import copy
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambient.lab.apiserver import schema
from ambient.lab.apiserver.schema import DEPLOYMENT, ENDPOINT_SLICE, NAMESPACE, NODE, POD, REPLICA_SET, SERVICE
from ambient.lab.apiserver.store import DeleteOptions, Store
from ambient.lab.controllers.deployments import template_hash
from ambient.lab.controllers.driver import reconcile, run_controllers
from ambient.lab.controllers.endpoints import desired_slices
from ambient.lab.controllers.scheduler import Unschedulable, choose_node
from tests.lab_api.conftest import until
from tests.lab_api.objects import deployment, lawful, node, pod, running, service

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def settle(store: Store) -> None:
    """Passes until nothing is left to do."""
    for _ in range(50):
        if reconcile(store) == 0:
            return
    raise AssertionError("the controllers never come to rest")


def report(store: Store, name: str, namespace: str = "default", *, ready: bool = True) -> None:
    address = "10.0.0." + str(1 + sum(map(ord, name)) % 250)
    status = running(address, ready=ready)
    store.modify(POD, namespace, name, lambda o: o.update(status={**o["status"], **status}), subresource="status")


def report_all(store: Store) -> None:
    for obj in store.all(POD):
        if obj["spec"].get("nodeName") and obj["status"]["phase"] == "Pending":
            report(store, obj["metadata"]["name"])


def live(store: Store) -> list[Any]:
    return [obj for obj in store.all(POD) if "deletionTimestamp" not in obj["metadata"]]


@pytest.fixture
def two_nodes(store: Store) -> Store:
    for name in ("n1", "n2"):
        store.create(NODE, "", node(name))
    return store


# --- deployments ----------------------------------------------------------------------------------------


def test_a_deployment_becomes_pods_with_the_names_and_owners_of_a_real_cluster(two_nodes: Store) -> None:
    made = two_nodes.create(DEPLOYMENT, "default", deployment(replicas=2))
    settle(two_nodes)
    (replica_set,) = two_nodes.all(REPLICA_SET)
    digest = template_hash(made["spec"]["template"])
    assert replica_set["metadata"]["name"] == f"web-{digest}"
    assert replica_set["metadata"]["ownerReferences"][0]["uid"] == made["metadata"]["uid"]
    pods = two_nodes.all(POD)
    assert len(pods) == 2
    for obj in pods:
        assert obj["metadata"]["name"].startswith(f"web-{digest}-")
        assert obj["metadata"]["labels"] == {"app": "web", "pod-template-hash": digest}
        assert obj["metadata"]["ownerReferences"][0]["kind"] == "ReplicaSet"
    assert {obj["spec"]["nodeName"] for obj in pods} == {"n1", "n2"}


def test_status_follows_the_pods(two_nodes: Store) -> None:
    two_nodes.create(DEPLOYMENT, "default", deployment(replicas=2))
    settle(two_nodes)
    status = two_nodes.get(DEPLOYMENT, "default", "web")["status"]
    assert (status["replicas"], status.get("readyReplicas", 0), status["unavailableReplicas"]) == (2, 0, 2)
    report_all(two_nodes)
    settle(two_nodes)
    status = two_nodes.get(DEPLOYMENT, "default", "web")["status"]
    assert (status["readyReplicas"], status["availableReplicas"], status["observedGeneration"]) == (2, 2, 1)
    assert {c["type"]: c["status"] for c in status["conditions"]} == {"Available": "True", "Progressing": "True"}


@pytest.mark.parametrize("replicas", [0, 1, 5])
def test_scaling_adds_and_removes_pods(two_nodes: Store, replicas: int) -> None:
    two_nodes.create(DEPLOYMENT, "default", deployment(replicas=2))
    settle(two_nodes)
    two_nodes.modify(DEPLOYMENT, "default", "web", lambda o: o["spec"].update(replicas=replicas))
    settle(two_nodes)
    assert len(live(two_nodes)) == replicas


def test_a_pod_that_is_not_ready_goes_before_one_that_is(two_nodes: Store) -> None:
    two_nodes.create(DEPLOYMENT, "default", deployment(replicas=3))
    settle(two_nodes)
    names = [obj["metadata"]["name"] for obj in two_nodes.all(POD)]
    for name in names:
        report(two_nodes, name, ready=name != names[1])
    two_nodes.modify(DEPLOYMENT, "default", "web", lambda o: o["spec"].update(replicas=2))
    settle(two_nodes)
    assert [obj["metadata"]["name"] for obj in live(two_nodes)] == [names[0], names[2]]


def test_a_rollout_never_has_fewer_available_or_more_pods_than_allowed(two_nodes: Store) -> None:
    rolling = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    two_nodes.create(DEPLOYMENT, "default", deployment(replicas=3, strategy=rolling))
    settle(two_nodes)
    report_all(two_nodes)
    settle(two_nodes)
    two_nodes.modify(
        DEPLOYMENT, "default", "web", lambda o: o["spec"]["template"]["spec"]["containers"][0].update(image="app:2")
    )
    for _ in range(12):
        reconcile(two_nodes)
        pods = live(two_nodes)
        ready = [p for p in pods if p["status"].get("containerStatuses")]
        assert len(pods) <= 4 and len(ready) >= 3
        report_all(two_nodes)
        for obj in two_nodes.all(POD):
            if "deletionTimestamp" in obj["metadata"]:
                two_nodes.delete(POD, "default", obj["metadata"]["name"], DeleteOptions(grace_period_s=0))
    assert {p["spec"]["containers"][0]["image"] for p in live(two_nodes)} == {"app:2"}
    assert len(live(two_nodes)) == 3


def test_a_rollout_to_a_template_that_never_becomes_ready_keeps_the_old_pods(two_nodes: Store) -> None:
    two_nodes.create(DEPLOYMENT, "default", deployment(replicas=3))
    settle(two_nodes)
    report_all(two_nodes)
    settle(two_nodes)
    two_nodes.modify(
        DEPLOYMENT, "default", "web", lambda o: o["spec"]["template"]["spec"]["containers"][0].update(image="broken")
    )
    settle(two_nodes)
    images = [p["spec"]["containers"][0]["image"] for p in live(two_nodes)]
    assert images.count("app:1") == 3 and images.count("broken") == 1


def test_recreate_waits_for_the_old_pods_to_be_gone(two_nodes: Store) -> None:
    two_nodes.create(DEPLOYMENT, "default", deployment(replicas=2, strategy={"type": "Recreate"}))
    settle(two_nodes)
    two_nodes.modify(
        DEPLOYMENT, "default", "web", lambda o: o["spec"]["template"]["spec"]["containers"][0].update(image="app:2")
    )
    settle(two_nodes)
    assert live(two_nodes) == [] and len(two_nodes.all(POD)) == 2
    for obj in two_nodes.all(POD):
        two_nodes.delete(POD, "default", obj["metadata"]["name"], DeleteOptions(grace_period_s=0))
    settle(two_nodes)
    assert {p["spec"]["containers"][0]["image"] for p in live(two_nodes)} == {"app:2"}


def test_a_paused_deployment_does_not_roll(two_nodes: Store) -> None:
    two_nodes.create(DEPLOYMENT, "default", deployment())
    settle(two_nodes)

    def change(obj: Any) -> None:
        obj["spec"]["paused"] = True
        obj["spec"]["template"]["spec"]["containers"][0]["image"] = "app:2"

    two_nodes.modify(DEPLOYMENT, "default", "web", change)
    settle(two_nodes)
    assert len(two_nodes.all(REPLICA_SET)) == 1


def test_pods_that_cannot_be_created_are_told_as_an_event(two_nodes: Store) -> None:
    body = deployment()
    body["spec"]["template"]["spec"]["serviceAccountName"] = "ghost"
    two_nodes.create(DEPLOYMENT, "default", body)
    for _ in range(5):
        reconcile(two_nodes)
    assert two_nodes.all(POD) == []
    reasons = {event["reason"]: event for event in two_nodes.all(schema.EVENT)}
    assert "ghost" in reasons["FailedCreate"]["message"] and reasons["FailedCreate"]["count"] > 1


@pytest.mark.parametrize("foreground", [False, True])
def test_what_a_deployment_owned_goes_with_it(two_nodes: Store, foreground: bool) -> None:
    two_nodes.create(DEPLOYMENT, "default", deployment())
    settle(two_nodes)
    propagation = "Foreground" if foreground else "Background"
    _, gone = two_nodes.delete(DEPLOYMENT, "default", "web", DeleteOptions(propagation=propagation))
    assert gone is not foreground
    settle(two_nodes)
    assert live(two_nodes) == []
    for obj in two_nodes.all(POD):
        two_nodes.delete(POD, "default", obj["metadata"]["name"], DeleteOptions(grace_period_s=0))
    settle(two_nodes)
    assert two_nodes.all(DEPLOYMENT) == two_nodes.all(REPLICA_SET) == two_nodes.all(POD) == []


def test_orphans_stay(two_nodes: Store) -> None:
    two_nodes.create(DEPLOYMENT, "default", deployment())
    settle(two_nodes)
    two_nodes.delete(DEPLOYMENT, "default", "web", DeleteOptions(propagation="Orphan"))
    settle(two_nodes)
    assert len(two_nodes.all(REPLICA_SET)) == 1 and len(live(two_nodes)) == 2


# --- scheduling -----------------------------------------------------------------------------------------

NODES = [node("n1"), node("n2"), node("n3")]


@pytest.mark.parametrize(
    ("spec", "nodes", "chosen"),
    [
        ({}, NODES, "n1"),
        ({"nodeSelector": {"kubernetes.io/hostname": "n2"}}, NODES, "n2"),
        ({"nodeSelector": {"disk": "ssd"}}, NODES, "didn't match Pod's node affinity/selector"),
        ({}, [node("n1", unschedulable=True)], "were unschedulable"),
        ({}, [node("n1", taints=[{"key": "a", "effect": "NoSchedule"}]), node("n2")], "n2"),
        (
            {"tolerations": [{"key": "a", "operator": "Exists"}]},
            [node("n1", taints=[{"key": "a", "effect": "NoSchedule"}])],
            "n1",
        ),
        ({}, [node("n1", taints=[{"key": "a", "effect": "NoExecute"}])], "had untolerated taint {a: }"),
        ({}, [], "no nodes"),
        ({}, [{**node("n1"), "status": {}}], "were not ready"),
        (
            {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
                {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": ["n3"]}]}
            ]}}}},
            NODES,
            "n3",
        ),
        (
            {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
                {"matchExpressions": [{"key": "x", "operator": "Gt", "values": ["1"]}]}
            ]}}}},
            NODES,
            "didn't match",
        ),
        (
            {"affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [{}]}}},
            NODES,
            "podAntiAffinity is not supported",
        ),
    ],
)  # fmt: skip
def test_a_node_is_chosen_or_the_reason_is_told(spec: Any, nodes: Any, chosen: str) -> None:
    found = choose_node(pod(**spec), nodes, [])
    if isinstance(found, Unschedulable):
        assert chosen in found.why
    else:
        assert found == chosen


@lawful
@given(st.integers(1, 4), st.integers(0, 12))
def test_pods_of_one_owner_are_spread_evenly(nodes: int, pods: int) -> None:
    names = [node(f"n{number}") for number in range(nodes)]
    placed: list[Any] = []
    for number in range(pods):
        one = pod(f"p{number}")
        one["metadata"]["ownerReferences"] = [{"uid": "owner"}]
        chosen = choose_node(one, names, placed)
        assert isinstance(chosen, str)
        one["spec"]["nodeName"] = chosen
        placed.append(one)
    counts = [sum(p["spec"]["nodeName"] == n["metadata"]["name"] for p in placed) for n in names]
    assert max(counts) - min(counts) <= 1


def test_a_pod_that_names_its_node_is_left_alone_and_one_that_fits_nowhere_says_so(two_nodes: Store) -> None:
    two_nodes.create(POD, "default", pod("named", nodeName="n2"))
    two_nodes.create(POD, "default", pod("homeless", nodeSelector={"disk": "ssd"}))
    settle(two_nodes)
    assert two_nodes.get(POD, "default", "named")["spec"]["nodeName"] == "n2"
    condition = two_nodes.get(POD, "default", "homeless")["status"]["conditions"][0]
    assert (condition["reason"], condition["status"]) == ("Unschedulable", "False")
    two_nodes.modify(NODE, "", "n1", lambda o: o["metadata"]["labels"].update(disk="ssd"))
    settle(two_nodes)
    assert two_nodes.get(POD, "default", "homeless")["spec"]["nodeName"] == "n1"


# --- endpoints ------------------------------------------------------------------------------------------


def member(name: str, *addresses: str, ready: bool = True, **extra: Any) -> dict[str, Any]:
    made = pod(name, nodeName="n1")
    made["metadata"].update(namespace="default", uid=f"uid-{name}", labels={"app": "web"})
    made["metadata"].update(extra)
    made["status"] = running(*addresses, ready=ready)
    return made


def endpoints(obj: Any, pods: Any) -> dict[Any, Any]:
    return {
        (family, tuple(port[:2] for port in ports)): [(e["addresses"][0], e["conditions"]) for e in found]
        for (family, ports), found in desired_slices(obj, pods, {}).items()
    }


def conditions(ready: bool, serving: bool, terminating: bool) -> dict[str, bool]:
    return {"ready": ready, "serving": serving, "terminating": terminating}


def stored(**spec: Any) -> dict[str, Any]:
    made = service(**spec)
    made["spec"].setdefault("ipFamilies", ["IPv4"])
    for port in made["spec"]["ports"]:
        port.setdefault("protocol", "TCP")
    return made


GOING = {"deletionTimestamp": "2026-01-01T00:00:00Z"}


@pytest.mark.parametrize(
    ("spec", "made", "expected"),
    [
        ({}, member("a", "10.0.0.1"), conditions(True, True, False)),
        ({}, member("a", "10.0.0.1", ready=False), conditions(False, False, False)),
        ({}, member("a", "10.0.0.1", **GOING), conditions(False, True, True)),
        ({}, member("a", "10.0.0.1", ready=False, **GOING), conditions(False, False, True)),
        (
            {"publishNotReadyAddresses": True},
            member("a", "10.0.0.1", ready=False),
            conditions(True, False, False),
        ),
    ],
)
def test_conditions_tell_ready_serving_and_terminating(spec: Any, made: Any, expected: Any) -> None:
    assert endpoints(stored(**spec), [made]) == {("IPv4", (("", 8080),)): [("10.0.0.1", expected)]}


def test_pods_that_ended_have_no_address_or_other_labels_are_no_endpoints() -> None:
    ended = member("a", "10.0.0.1")
    ended["status"]["phase"] = "Succeeded"
    bare = member("b", "10.0.0.2")
    bare["status"].update(podIP="", podIPs=[])
    other = member("c", "10.0.0.3", labels={"app": "other"})
    assert endpoints(stored(), [ended, bare, other]) == {("IPv4", ()): []}


def test_each_family_has_its_own_slice() -> None:
    both = member("a", "10.0.0.1", "fd00::1")
    found = endpoints(stored(ipFamilies=["IPv6", "IPv4"]), [both, member("b", "10.0.0.2")])
    assert [address for address, _ in found["IPv6", (("", 8080),)]] == ["fd00::1"]
    assert [address for address, _ in found["IPv4", (("", 8080),)]] == ["10.0.0.1", "10.0.0.2"]


def test_a_named_target_port_is_found_in_each_pod() -> None:
    def named(name: str, address: str, number: int) -> Any:
        made = member(name, address)
        made["spec"]["containers"][0]["ports"] = [{"name": "web", "containerPort": number, "protocol": "TCP"}]
        return made

    pods = [named("a", "10.0.0.1", 8080), named("b", "10.0.0.2", 9090), member("c", "10.0.0.3")]
    found = endpoints(stored(ports=[{"name": "http", "port": 80, "targetPort": "web"}]), pods)
    assert {key[1][0]: [a for a, _ in value] for key, value in found.items()} == {
        ("http", 8080): ["10.0.0.1"],
        ("http", 9090): ["10.0.0.2"],
    }


def test_slices_follow_pods_and_go_with_the_service(two_nodes: Store) -> None:
    two_nodes.create(SERVICE, "default", service())
    two_nodes.create(DEPLOYMENT, "default", deployment(replicas=2))
    settle(two_nodes)
    (piece,) = two_nodes.all(ENDPOINT_SLICE)
    assert piece["metadata"]["labels"]["kubernetes.io/service-name"] == "web"
    assert piece["endpoints"] == []
    report_all(two_nodes)
    settle(two_nodes)
    (piece,) = two_nodes.all(ENDPOINT_SLICE)
    assert len(piece["endpoints"]) == 2 and piece["ports"] == [{"name": "", "port": 8080, "protocol": "TCP"}]
    version = piece["metadata"]["resourceVersion"]
    settle(two_nodes)
    assert two_nodes.all(ENDPOINT_SLICE)[0]["metadata"]["resourceVersion"] == version
    two_nodes.delete(SERVICE, "default", "web")
    settle(two_nodes)
    assert two_nodes.all(ENDPOINT_SLICE) == []


def test_the_older_endpoints_object_says_the_same(two_nodes: Store) -> None:
    two_nodes.create(SERVICE, "default", service())
    two_nodes.create(DEPLOYMENT, "default", deployment(replicas=2))
    settle(two_nodes)
    assert "subsets" not in two_nodes.get(schema.ENDPOINTS, "default", "web")
    first, second = (obj["metadata"]["name"] for obj in two_nodes.all(POD))
    report(two_nodes, first)
    report(two_nodes, second, ready=False)
    settle(two_nodes)
    (subset,) = two_nodes.get(schema.ENDPOINTS, "default", "web")["subsets"]
    assert [address["targetRef"]["name"] for address in subset["addresses"]] == [first]
    assert [address["targetRef"]["name"] for address in subset["notReadyAddresses"]] == [second]
    assert subset["ports"] == [{"port": 8080, "protocol": "TCP"}]
    two_nodes.delete(SERVICE, "default", "web")
    settle(two_nodes)
    assert two_nodes.find(schema.ENDPOINTS, "default", "web") is None


def test_endpoints_made_by_hand_are_left_alone(two_nodes: Store) -> None:
    by_hand = {"metadata": {"name": "web"}, "subsets": [{"addresses": [{"ip": "192.0.2.1"}]}]}
    two_nodes.create(schema.ENDPOINTS, "default", by_hand)
    two_nodes.create(SERVICE, "default", service())
    settle(two_nodes)
    assert two_nodes.get(schema.ENDPOINTS, "default", "web")["subsets"] == by_hand["subsets"]


def test_a_service_without_a_selector_keeps_slices_made_by_hand(two_nodes: Store) -> None:
    body = service()
    del body["spec"]["selector"]
    two_nodes.create(SERVICE, "default", body)
    by_hand = {
        "metadata": {"name": "hand", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["192.0.2.1"]}],
    }
    two_nodes.create(ENDPOINT_SLICE, "default", by_hand)
    settle(two_nodes)
    assert [piece["metadata"]["name"] for piece in two_nodes.all(ENDPOINT_SLICE)] == ["hand"]


def test_more_than_a_hundred_endpoints_need_more_slices(two_nodes: Store) -> None:
    two_nodes.create(SERVICE, "default", service())
    for number in range(150):
        body = pod(f"p{number:03}", nodeName="n1")
        body["metadata"]["labels"] = {"app": "web"}
        two_nodes.create(POD, "default", body)
        status = running(f"10.0.{number // 100}.{number % 100}")
        two_nodes.modify(POD, "default", f"p{number:03}", lambda o, s=status: o.update(status=s), subresource="status")
    settle(two_nodes)
    assert sorted(len(piece["endpoints"]) for piece in two_nodes.all(ENDPOINT_SLICE)) == [50, 100]


# --- namespaces and garbage -----------------------------------------------------------------------------


def test_a_deleted_namespace_goes_when_its_pods_are_gone(two_nodes: Store) -> None:
    two_nodes.create(NAMESPACE, "", {"metadata": {"name": "shop"}})
    two_nodes.create(DEPLOYMENT, "shop", deployment())
    two_nodes.create(schema.AUTHORIZATION_POLICY, "shop", {"metadata": {"name": "p"}, "spec": {}})
    settle(two_nodes)
    two_nodes.delete(NAMESPACE, "", "shop")
    settle(two_nodes)
    assert two_nodes.find(NAMESPACE, "", "shop") is not None
    assert two_nodes.all(DEPLOYMENT) == two_nodes.all(schema.AUTHORIZATION_POLICY) == []
    for obj in two_nodes.all(POD):
        two_nodes.delete(POD, "shop", obj["metadata"]["name"], DeleteOptions(grace_period_s=0))
    settle(two_nodes)
    assert two_nodes.find(NAMESPACE, "", "shop") is None
    assert all(obj["metadata"]["namespace"] != "shop" for obj in two_nodes.all(schema.SERVICE_ACCOUNT))


def test_the_default_service_account_comes_back(store: Store) -> None:
    store.delete(schema.SERVICE_ACCOUNT, "default", "default")
    settle(store)
    assert store.find(schema.SERVICE_ACCOUNT, "default", "default") is not None


def test_an_object_stays_while_one_owner_is_left_or_its_kind_is_unknown(store: Store) -> None:
    owner = store.create(schema.CONFIG_MAP, "default", {"metadata": {"name": "owner"}})

    def reference(uid: str, kind: str = "ConfigMap") -> dict[str, Any]:
        return {"apiVersion": "v1", "kind": kind, "name": "owner", "uid": uid}

    real = owner["metadata"]["uid"]
    for name, owners in (
        ("two", [reference(real), reference("gone")]),
        ("strange", [reference("gone", "Widget")]),
        ("lost", [reference("gone")]),
    ):
        store.create(schema.CONFIG_MAP, "default", {"metadata": {"name": name, "ownerReferences": owners}})
    settle(store)
    assert [obj["metadata"]["name"] for obj in store.all(schema.CONFIG_MAP)] == ["owner", "strange", "two"]


def test_a_pod_being_deleted_on_a_lost_node_goes_and_one_on_a_live_node_waits(two_nodes: Store) -> None:
    for name, where in (("a", "n1"), ("b", "n2")):
        two_nodes.create(POD, "default", pod(name, nodeName=where))
        two_nodes.delete(POD, "default", name)
    two_nodes.delete(NODE, "", "n1")
    settle(two_nodes)
    assert [obj["metadata"]["name"] for obj in two_nodes.all(POD)] == ["b"]


async def test_the_driver_acts_on_writes_and_survives_a_controller_that_fails(
    two_nodes: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ambient.lab.controllers import driver

    def fails(_: Store) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(driver, "CONTROLLERS", (fails, *driver.CONTROLLERS))
    task = asyncio.create_task(run_controllers(two_nodes))
    two_nodes.create(DEPLOYMENT, "default", deployment(replicas=3))
    await until(lambda: len([p for p in two_nodes.all(POD) if p["spec"].get("nodeName")]) == 3)
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_plans_change_nothing_they_were_given(two_nodes: Store) -> None:
    two_nodes.create(SERVICE, "default", service())
    two_nodes.create(DEPLOYMENT, "default", deployment())
    for _ in range(4):
        before = {kind.resource: copy.deepcopy(two_nodes.all(kind)) for kind in two_nodes.registry.stored()}
        from ambient.lab.controllers.driver import CONTROLLERS

        for controller in CONTROLLERS:
            list(controller(two_nodes))
        assert before == {kind.resource: two_nodes.all(kind) for kind in two_nodes.registry.stored()}
        reconcile(two_nodes)
        report_all(two_nodes)
