"""What deployments become, what is taken away with a namespace or an owner, and the driver of all controllers."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest

from ambient.lab.apiserver import schema
from ambient.lab.apiserver.schema import DEPLOYMENT, NAMESPACE, NODE, POD, REPLICA_SET, SERVICE
from ambient.lab.apiserver.store import DeleteOptions, Store
from ambient.lab.controllers.deployments import template_hash
from ambient.lab.controllers.driver import reconcile, run_controllers
from tests.lab_api.conftest import until
from tests.lab_api.objects import deployment, live, pod, report, report_all, service, settle

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
