"""Small manifests for the tests of the API server and the controllers."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings

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
