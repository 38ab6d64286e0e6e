"""Small manifests for the tests of the API server and the controllers, and what happens to them on a store."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings

from ambient.lab.apiserver.schema import POD
from ambient.lab.apiserver.store import Store
from ambient.lab.controllers.driver import reconcile

lawful = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
"""For laws: the machine may be busy, which says nothing about them."""

Object = dict[str, Any]


def pod(name: str = "one", **spec: Any) -> Object:
    container = {"name": "c", "image": "app:1"}
    return {"metadata": {"name": name}, "spec": {"containers": [container], **spec}}


def service(name: str = "web", **spec: Any) -> Object:
    ports = [{"port": 80, "targetPort": 8080}]
    return {"metadata": {"name": name}, "spec": {"selector": {"app": name}, "ports": ports, **spec}}


def deployment(name: str = "web", replicas: int = 2, image: str = "app:1", **spec: Any) -> Object:
    labels = {"app": name}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": image}]}}
    return {
        "metadata": {"name": name},
        "spec": {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template, **spec},
    }


def node(name: str, **spec: Any) -> Object:
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "spec": spec,
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    }


def running(*addresses: str, ready: bool = True) -> Object:
    """The status a kubelet reports."""
    return {
        "phase": "Running",
        "podIP": addresses[0],
        "podIPs": [{"ip": address} for address in addresses],
        "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        "containerStatuses": [
            {"name": "c", "ready": ready, "restartCount": 0, "image": "app:1", "imageID": "", "state": {"running": {}}}
        ],
    }


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
