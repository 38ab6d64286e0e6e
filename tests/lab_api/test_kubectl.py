"""A stock kubectl against the server: what people do with it, and what it says in return."""

from __future__ import annotations

import asyncio
import json

import pytest
import yaml

from ambient.lab.apiserver import schema
from ambient.lab.apiserver.schema import POD
from ambient.lab.controllers.driver import CONTROLLERS, reconcile, run_controllers
from tests.lab_api.conftest import Kubectl, until
from tests.lab_api.objects import node, running

pytestmark = pytest.mark.interop

SHOP = """
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: web, namespace: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: one, namespace: shop, labels: {app: one}}
spec:
  serviceAccountName: web
  containers:
  - {name: c, image: app, command: [sleep, "1"], ports: [{containerPort: 80}], env: [{name: A, value: b}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers: [{name: c, image: "app:1"}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny, namespace: shop}
spec: {action: DENY, rules: [{from: [{source: {namespaces: [x]}}]}]}
"""
NAMES = (
    "namespace/shop",
    "serviceaccount/web",
    "pod/one",
    "deployment.apps/web",
    "service/web",
    "authorizationpolicy.security.istio.io/deny",
)


async def test_apply_creates_then_finds_nothing_to_do_then_changes_only_what_changed(kubectl: Kubectl) -> None:
    assert (await kubectl.ok("apply", "-f", "-", stdin=SHOP)).splitlines() == [f"{name} created" for name in NAMES]
    assert (await kubectl.ok("apply", "-f", "-", stdin=SHOP)).splitlines() == [f"{name} unchanged" for name in NAMES]
    changed = SHOP.replace("replicas: 2", "replicas: 3").replace("namespaces: [x]", "namespaces: [y]")
    lines = (await kubectl.ok("apply", "-f", "-", stdin=changed)).splitlines()
    configured = {"deployment.apps/web", "authorizationpolicy.security.istio.io/deny"}
    assert lines == [f"{name} {'configured' if name in configured else 'unchanged'}" for name in NAMES]
    service = next(doc for doc in yaml.safe_load_all(changed) if doc["kind"] == "Service")
    service["spec"]["ports"] = [{"port": 81, "targetPort": 8080}]
    await kubectl.ok("apply", "-f", "-", stdin=yaml.safe_dump(service))
    ports = await kubectl.ok("get", "service", "web", "-n", "shop", "-o", "jsonpath={.spec.ports[*].port}")
    assert ports == "81"


async def test_what_the_server_refuses_kubectl_says(kubectl: Kubectl) -> None:
    broken = SHOP.replace("app: web}}\n    spec", "app: other}}\n    spec")
    assert "`selector` does not match template `labels`" in await kubectl.fails("apply", "-f", "-", stdin=broken)
    assert 'namespaces "ghost" not found' in await kubectl.fails("run", "x", "--image=i", "-n", "ghost")
    assert 'pods "x" not found' in await kubectl.fails("get", "pod", "x")


async def test_tables_are_those_of_a_real_server(kubectl: Kubectl) -> None:
    await kubectl.ok("apply", "-f", "-", stdin=SHOP)
    pods = (await kubectl.ok("get", "pods", "-n", "shop", "-o", "wide")).splitlines()
    assert pods[0].split()[:7] == ["NAME", "READY", "STATUS", "RESTARTS", "AGE", "IP", "NODE"]
    assert pods[1].split()[:4] == ["one", "0/1", "Pending", "0"]
    everywhere = (await kubectl.ok("get", "services", "-A")).splitlines()
    assert everywhere[0].split() == ["NAMESPACE", "NAME", "TYPE", "CLUSTER-IP", "EXTERNAL-IP", "PORT(S)", "AGE"]
    assert everywhere[1].split()[0] == "shop"
    policies = (await kubectl.ok("get", "ap", "-n", "shop")).splitlines()
    assert (policies[0].split(), policies[1].split()[:2]) == (["NAME", "ACTION", "AGE"], ["deny", "DENY"])
    assert "deployment.apps/web" in await kubectl.ok("get", "all", "-n", "shop")
    assert (await kubectl.ok("get", "pods", "-n", "shop", "-o", "name")).strip() == "pod/one"


async def test_an_object_printed_as_yaml_can_be_replaced_and_an_old_one_cannot(kubectl: Kubectl) -> None:
    await kubectl.ok("apply", "-f", "-", stdin=SHOP)
    shown = await kubectl.ok("get", "pod", "one", "-n", "shop", "-o", "yaml")
    obj = yaml.safe_load(shown)
    assert (obj["kind"], obj["spec"]["containers"][0]["env"]) == ("Pod", [{"name": "A", "value": "b"}])
    obj["metadata"]["labels"]["app"] = "two"
    assert "replaced" in await kubectl.ok("replace", "-f", "-", stdin=yaml.safe_dump(obj))
    obj["metadata"]["labels"]["app"] = "three"
    assert "the object has been modified" in await kubectl.fails("replace", "-f", "-", stdin=yaml.safe_dump(obj))


async def test_labels_and_annotations_are_set_shown_and_removed(kubectl: Kubectl) -> None:
    await kubectl.ok("apply", "-f", "-", stdin=SHOP)
    assert "labeled" in await kubectl.ok("label", "namespace", "shop", "istio.io/dataplane-mode=ambient")
    assert "already has a value" in await kubectl.fails("label", "namespace", "shop", "istio.io/dataplane-mode=none")
    selected = await kubectl.ok("get", "ns", "-l", "istio.io/dataplane-mode=ambient", "-o", "name")
    assert selected.strip() == "namespace/shop"
    column = (await kubectl.ok("get", "ns", "shop", "-L", "istio.io/dataplane-mode")).splitlines()[1]
    assert column.split()[-1] == "ambient"
    await kubectl.ok("label", "namespace", "shop", "istio.io/dataplane-mode-")
    assert await kubectl.ok("get", "ns", "-l", "istio.io/dataplane-mode", "-o", "name") == ""
    await kubectl.ok("annotate", "pod", "one", "-n", "shop", "a/b=c")
    assert kubectl.cluster.store.get(POD, "shop", "one")["metadata"]["annotations"]["a/b"] == "c"


@pytest.mark.parametrize(
    ("how", "patch"),
    [
        ("strategic", {"spec": {"containers": [{"name": "c", "image": "app:2"}]}}),
        ("json", [{"op": "replace", "path": "/spec/containers/0/image", "value": "app:2"}]),
        ("merge", {"spec": {"terminationGracePeriodSeconds": 1}}),
    ],
)
async def test_each_type_of_patch_is_accepted(kubectl: Kubectl, how: str, patch: object) -> None:
    await kubectl.ok("apply", "-f", "-", stdin=SHOP)
    before = kubectl.cluster.store.get(POD, "shop", "one")
    out = await kubectl.ok("patch", "pod", "one", "-n", "shop", f"--type={how}", "-p", json.dumps(patch))
    assert out.strip() == "pod/one patched"
    after = kubectl.cluster.store.get(POD, "shop", "one")
    assert before["spec"] != after["spec"]
    assert after["spec"]["containers"][0]["name"] == "c"
    refused = json.dumps([{"op": "remove", "path": "/none"}])
    await kubectl.fails("patch", "pod", "one", "-n", "shop", "--type=json", "-p", refused)


async def test_objects_are_created_by_command(kubectl: Kubectl) -> None:
    for command in (
        "create namespace shop",
        "create serviceaccount web -n shop",
        "create configmap m -n shop --from-literal=a=b",
        "create secret generic s -n shop --from-literal=a=b",
        "create service clusterip svc -n shop --tcp=80:8080",
        "create deployment web -n shop --image=app:1",
        "run one -n shop --image=app:1",
    ):
        assert "created" in await kubectl.ok(*command.split())
    store = kubectl.cluster.store
    assert store.get(schema.SECRET, "shop", "s")["data"] == {"a": "Yg=="}
    assert store.get(schema.SERVICE, "shop", "svc")["spec"]["ports"][0]["targetPort"] == 8080
    assert store.get(schema.DEPLOYMENT, "shop", "web")["spec"]["template"]["spec"]["containers"][0]["image"] == "app:1"
    assert "already exists" in await kubectl.fails("create", "namespace", "shop")


async def test_server_side_apply_works_and_dry_runs_change_nothing(kubectl: Kubectl) -> None:
    assert "serverside-applied" in await kubectl.ok("apply", "--server-side", "-f", "-", stdin=SHOP)
    version = kubectl.cluster.store.get(POD, "shop", "one")["metadata"]["resourceVersion"]
    await kubectl.ok("apply", "--server-side", "-f", "-", stdin=SHOP)
    assert kubectl.cluster.store.get(POD, "shop", "one")["metadata"]["resourceVersion"] == version
    other = SHOP.replace("namespaces: [x]", "namespaces: [z]")
    arguments = ("apply", "--server-side", "--field-manager=other", "-f", "-")
    assert "conflict" in await kubectl.fails(*arguments, stdin=other)
    await kubectl.ok("apply", "--dry-run=server", "-f", "-", stdin=SHOP.replace("name: one", "name: two"))
    assert kubectl.cluster.store.find(POD, "shop", "two") is None


async def test_editing_changes_the_object(kubectl: Kubectl) -> None:
    await kubectl.ok("apply", "-f", "-", stdin=SHOP)
    kubectl.environment["KUBE_EDITOR"] = "sed -i s/DENY/ALLOW/"
    assert "edited" in await kubectl.ok("edit", "authorizationpolicy", "deny", "-n", "shop")
    assert kubectl.cluster.store.get(schema.AUTHORIZATION_POLICY, "shop", "deny")["spec"]["action"] == "ALLOW"


async def test_acting_as_a_service_account_has_its_rights_only(kubectl: Kubectl) -> None:
    account = "--as=system:serviceaccount:default:default"
    assert "NAME" in await kubectl.ok("get", "ns", account)
    assert 'cannot list resource "secrets"' in await kubectl.fails("get", "secrets", account)
    assert "cannot create" in await kubectl.fails("run", "x", "--image=i", account)
    assert (await kubectl.ok("auth", "can-i", "list", "pods", account)).strip() == "yes"
    assert (await kubectl.run("auth", "can-i", "list", "secrets", account))[1].strip() == "no"


async def test_describing_shows_events_and_endpoints(kubectl: Kubectl) -> None:
    await kubectl.ok("apply", "-f", "-", stdin=SHOP)
    while reconcile(kubectl.cluster.store, CONTROLLERS):
        pass
    assert "FailedScheduling" in await kubectl.ok("describe", "pod", "one", "-n", "shop")
    assert "Endpoints:" in await kubectl.ok("describe", "service", "web", "-n", "shop")
    assert "ScalingReplicaSet" in await kubectl.ok("describe", "deployment", "web", "-n", "shop")


async def test_a_watch_prints_changes_as_they_come(kubectl: Kubectl) -> None:
    await kubectl.ok("apply", "-f", "-", stdin=SHOP)
    process = await kubectl.start("get", "pods", "-n", "shop", "-w")
    assert process.stdout is not None
    lines = [await asyncio.wait_for(process.stdout.readline(), 10) for _ in range(2)]
    assert lines[0].split()[0] == b"NAME" and lines[1].split()[:3] == [b"one", b"0/1", b"Pending"]
    store = kubectl.cluster.store
    store.modify(POD, "shop", "one", lambda o: o.update(status=running("10.0.0.1")), subresource="status")
    line = await asyncio.wait_for(process.stdout.readline(), 10)
    assert line.split()[:3] == [b"one", b"1/1", b"Running"]
    process.terminate()
    await process.communicate()


async def test_deleting_waits_for_the_object_to_be_gone(kubectl: Kubectl) -> None:
    await kubectl.ok("apply", "-f", "-", stdin=SHOP)
    store = kubectl.cluster.store
    store.bind("shop", "one", "n1")
    process = await kubectl.start("delete", "pod", "one", "-n", "shop")
    await until(lambda: "deletionTimestamp" in store.get(POD, "shop", "one")["metadata"])
    assert process.returncode is None
    assert "Terminating" in await kubectl.ok("get", "pod", "one", "-n", "shop")
    await kubectl.ok("delete", "pod", "one", "-n", "shop", "--grace-period=0", "--force")
    await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 0 and store.find(POD, "shop", "one") is None
    assert "deleted" in await kubectl.ok("delete", "service,ap", "--all", "-n", "shop")


async def test_a_deployment_scales_rolls_and_goes_with_its_namespace(kubectl: Kubectl) -> None:
    store = kubectl.cluster.store
    store.create(schema.NODE, "", node("n1"))
    tasks = [asyncio.create_task(run_controllers(store)), asyncio.create_task(kubelet(kubectl))]
    try:
        await kubectl.ok("apply", "-f", "-", stdin=SHOP)
        await kubectl.ok("rollout", "status", "deployment/web", "-n", "shop", "--timeout=10s")
        await kubectl.ok("scale", "deployment/web", "-n", "shop", "--replicas=3")
        await kubectl.ok("set", "image", "deployment/web", "c=app:2", "-n", "shop")
        await kubectl.ok("rollout", "status", "deployment/web", "-n", "shop", "--timeout=10s")
        shown = (await kubectl.ok("get", "deployment", "web", "-n", "shop")).splitlines()[1]
        assert shown.split()[:4] == ["web", "3/3", "3", "3"]
        images = await kubectl.ok("get", "pods", "-n", "shop", "-l", "app=web", "-o", "jsonpath={..image}")
        assert "app:2" in images and "app:1" not in {p["spec"]["containers"][0]["image"] for p in _live(store)}
        slices = await kubectl.ok("get", "endpointslices", "-n", "shop", "-o", "jsonpath={..addresses}")
        assert slices.count("10.0.0.") == 3
        await kubectl.ok("delete", "namespace", "shop", "--timeout=10s")
        assert store.all(POD) == []
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _live(store: object) -> list[dict[str, object]]:
    return [p for p in store.all(POD) if "deletionTimestamp" not in p["metadata"] and p["metadata"]["name"] != "one"]  # type: ignore[attr-defined]


async def kubelet(kubectl: Kubectl) -> None:
    """Runs every pod of every node in no time, and lets go of those that are to be deleted."""
    from ambient.lab.apiserver.store import DeleteOptions

    store, number = kubectl.cluster.store, 0
    wake = asyncio.Event()
    store.history.listen(lambda resource: wake.set() if resource == "pods" else None)
    while True:
        wake.clear()
        for pod in store.all(POD):
            name = pod["metadata"]["name"]
            if not pod["spec"].get("nodeName"):
                continue
            if "deletionTimestamp" in pod["metadata"]:
                store.delete(POD, "shop", name, DeleteOptions(grace_period_s=0))
            elif pod["status"]["phase"] == "Pending":
                number += 1
                status = running(f"10.0.0.{number}")
                store.modify(POD, "shop", name, lambda o, s=status: o.update(status=s), subresource="status")
        await wake.wait()
