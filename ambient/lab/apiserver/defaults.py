"""Values a real API server fills in for fields left out. Works in place on an object that `shapes` checked."""

from __future__ import annotations

import base64
from typing import Any

from ambient.lab.apiserver.schema import Kind
from ambient.lab.apiserver.status import JsonObject


def _default(obj: JsonObject, **values: Any) -> None:
    for key, value in values.items():
        obj.setdefault(key, value)


def _probe(container: JsonObject, name: str) -> None:
    probe = container.get(name)
    if probe is None:
        return
    _default(probe, timeoutSeconds=1, periodSeconds=10, successThreshold=1, failureThreshold=3)
    if "httpGet" in probe:
        _default(probe["httpGet"], path="/", scheme="HTTP")


def _container(container: JsonObject) -> None:
    image = container.get("image", "")
    tag = image.rpartition("/")[2].partition(":")[2]
    policy = "Always" if "@" not in image and tag in ("", "latest") else "IfNotPresent"
    _default(
        container,
        imagePullPolicy=policy,
        resources={},
        terminationMessagePath="/dev/termination-log",
        terminationMessagePolicy="File",
    )
    for port in container.get("ports", ()):
        _default(port, protocol="TCP")
    for name in ("livenessProbe", "readinessProbe", "startupProbe"):
        _probe(container, name)
    for entry in container.get("env", ()):
        if "fieldRef" in entry.get("valueFrom", {}):
            _default(entry["valueFrom"]["fieldRef"], apiVersion="v1")


def pod_spec(spec: JsonObject) -> None:
    _default(
        spec,
        restartPolicy="Always",
        terminationGracePeriodSeconds=30,
        dnsPolicy="ClusterFirst",
        schedulerName="default-scheduler",
        securityContext={},
    )
    for container in (*spec.get("initContainers", ()), *spec.get("containers", ())):
        _container(container)
    for volume in spec.get("volumes", ()):
        for source in volume.get("projected", {}).get("sources", ()):
            if "serviceAccountToken" in source:
                _default(source["serviceAccountToken"], expirationSeconds=3600)
        for name in ("projected", "configMap", "secret"):
            if name in volume:
                _default(volume[name], defaultMode=0o644)
    account = spec.get("serviceAccountName") or spec.get("serviceAccount")
    if account:
        spec["serviceAccountName"] = spec["serviceAccount"] = account


def _pod(obj: JsonObject) -> None:
    spec = obj.setdefault("spec", {})
    _default(spec, enableServiceLinks=True)
    if not spec.get("serviceAccountName"):
        spec["serviceAccountName"] = spec.get("serviceAccount") or "default"
    pod_spec(spec)
    if "preemptionPolicy" not in spec:
        _default(spec, preemptionPolicy="PreemptLowerPriority", priority=0)


def _service(obj: JsonObject) -> None:
    spec = obj.setdefault("spec", {})
    _default(spec, type="ClusterIP", sessionAffinity="None")
    if spec["type"] != "ExternalName":
        _default(spec, internalTrafficPolicy="Cluster")
    if spec["type"] in ("NodePort", "LoadBalancer"):
        _default(spec, externalTrafficPolicy="Cluster")
    if spec["type"] == "LoadBalancer":
        _default(spec, allocateLoadBalancerNodePorts=True)
    for port in spec.get("ports", ()):
        _default(port, protocol="TCP")
        if port.get("targetPort") in (None, 0, "") and "port" in port:
            port["targetPort"] = port["port"]


def _template(obj: JsonObject) -> None:
    spec = obj.setdefault("spec", {})
    _default(spec, replicas=1)
    template = spec.setdefault("template", {})
    template.setdefault("metadata", {}).setdefault("creationTimestamp", None)
    pod_spec(template.setdefault("spec", {}))


def _deployment(obj: JsonObject) -> None:
    _template(obj)
    spec = obj["spec"]
    _default(spec, revisionHistoryLimit=10, progressDeadlineSeconds=600, strategy={})
    strategy = spec["strategy"]
    _default(strategy, type="RollingUpdate")
    if strategy["type"] == "RollingUpdate":
        strategy.setdefault("rollingUpdate", {})
        _default(strategy["rollingUpdate"], maxSurge="25%", maxUnavailable="25%")


def _secret(obj: JsonObject) -> None:
    _default(obj, type="Opaque")
    for key, value in obj.pop("stringData", {}).items():
        obj.setdefault("data", {})[key] = base64.b64encode(value.encode()).decode()


def _endpoint_slice(obj: JsonObject) -> None:
    obj.setdefault("endpoints", [])
    for port in obj.get("ports", ()):
        _default(port, name="", protocol="TCP")


def apply_defaults(kind: Kind, obj: JsonObject) -> None:
    """Fill in ``obj`` in place."""
    match kind.resource:
        case "namespaces":
            obj["metadata"].setdefault("labels", {})["kubernetes.io/metadata.name"] = obj["metadata"].get("name", "")
            _default(obj, spec={})
            _default(obj["spec"], finalizers=["kubernetes"])
        case "pods":
            _pod(obj)
        case "services":
            _service(obj)
        case "deployments.apps":
            _deployment(obj)
        case "replicasets.apps":
            _template(obj)
        case "secrets":
            _secret(obj)
        case "endpointslices.discovery.k8s.io":
            _endpoint_slice(obj)
        case "events":
            _default(obj, type="Normal", count=1)


def initial_status(kind: Kind, obj: JsonObject) -> JsonObject | None:
    """The status a new object gets, whatever its creator wrote there; None for no status field."""
    match kind.resource:
        case "namespaces":
            return {"phase": "Active"}
        case "pods":
            return {"phase": "Pending", "qosClass": _quality(obj)}
        case "services":
            return {"loadBalancer": {}}
        case "deployments.apps":
            return {}
        case "replicasets.apps":
            return {"replicas": 0}
        case "nodes":
            return dict(obj.get("status", {}))  # kubelets register themselves with their status
    return None


def _quality(pod: JsonObject) -> str:
    resources = [c.get("resources") or {} for c in pod["spec"].get("containers", ())]
    if not any(r.get("requests") or r.get("limits") for r in resources):
        return "BestEffort"
    full = all({"cpu", "memory"} <= set(r.get("limits") or ()) for r in resources)
    same = all(r.get("requests", r.get("limits")) == r.get("limits") for r in resources)
    return "Guaranteed" if full and same else "Burstable"
