"""Services and pods to EndpointSlices: one set per address family, split where named ports differ between pods."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from ambient.lab.apiserver import schema
from ambient.lab.apiserver.status import JsonObject
from ambient.lab.controllers.steps import (
    Create,
    Delete,
    Step,
    Write,
    controlled_by,
    doomed,
    owner_reference,
    pod_ready,
)

MANAGED_BY = "endpointslice.kubernetes.io/managed-by"
MANAGER = "endpointslice-controller.k8s.io"
SERVICE_NAME = "kubernetes.io/service-name"
HEADLESS = "service.kubernetes.io/headless"
ZONE = "topology.kubernetes.io/zone"
ENDPOINTS_MAX = 100
"""Endpoints in one slice, as the real controller's default."""

_Ports = tuple[tuple[str, int, str, str], ...]
"""Name, number, protocol, application protocol."""


def _selected(service: JsonObject, pods: Sequence[JsonObject]) -> list[JsonObject]:
    selector = service["spec"]["selector"].items()
    found = [pod for pod in pods if selector <= pod["metadata"].get("labels", {}).items()]
    return [pod for pod in found if pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")]


def _ports(service: JsonObject, pod: JsonObject) -> _Ports:
    """The target ports of ``service`` in ``pod``; a name that the pod does not have is left out."""
    ports = []
    for port in service["spec"].get("ports", ()):
        target: Any = port.get("targetPort", port["port"])
        if isinstance(target, str):
            target = next(
                (
                    declared["containerPort"]
                    for container in pod["spec"].get("containers", ())
                    for declared in container.get("ports", ())
                    if declared.get("name") == target and declared.get("protocol", "TCP") == port["protocol"]
                ),
                None,
            )
        if target is not None:
            ports.append((port.get("name", ""), int(target), port["protocol"], port.get("appProtocol", "")))
    return tuple(ports)


def _endpoint(service: JsonObject, pod: JsonObject, address: str, zones: Mapping[str, str]) -> JsonObject:
    serving, terminating = pod_ready(pod), doomed(pod)
    ready = bool(service["spec"].get("publishNotReadyAddresses")) or (serving and not terminating)
    metadata, spec = pod["metadata"], pod["spec"]
    endpoint: JsonObject = {
        "addresses": [address],
        "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
        "targetRef": {
            "kind": "Pod",
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "uid": metadata["uid"],
        },
    }
    if spec.get("nodeName"):
        endpoint["nodeName"] = spec["nodeName"]
        if zone := zones.get(spec["nodeName"]):
            endpoint["zone"] = zone
    if spec.get("hostname") and spec.get("subdomain") == service["metadata"]["name"]:
        endpoint["hostname"] = spec["hostname"]
    return endpoint


def _addresses(pod: JsonObject, family: str) -> list[str]:
    status = pod.get("status", {})
    known = [entry["ip"] for entry in status.get("podIPs", ()) if entry.get("ip")] or [status.get("podIP")]
    return [ip for ip in known if ip and (":" in ip) == (family == "IPv6")][:1]


def desired_slices(
    service: JsonObject, pods: Sequence[JsonObject], zones: Mapping[str, str]
) -> dict[tuple[str, _Ports], list[JsonObject]]:
    """Endpoints by address family and resolved ports; a family without any has one empty entry."""
    wanted: dict[tuple[str, _Ports], list[JsonObject]] = {}
    selected = sorted(_selected(service, pods), key=lambda pod: str(pod["metadata"]["name"]))
    for family in service["spec"].get("ipFamilies", ["IPv4"]):
        for pod in selected:
            ports = _ports(service, pod)
            if service["spec"].get("ports") and not ports:
                continue
            for address in _addresses(pod, family):
                wanted.setdefault((family, ports), []).append(_endpoint(service, pod, address, zones))
        if not any(key[0] == family for key in wanted):
            wanted[family, ()] = []
    return wanted


def _slice_key(piece: JsonObject) -> tuple[str, _Ports]:
    ports = tuple(
        (port.get("name", ""), port.get("port", 0), port.get("protocol", "TCP"), port.get("appProtocol", ""))
        for port in piece.get("ports", ())
    )
    return piece["addressType"], ports


def _port_document(port: tuple[str, int, str, str]) -> JsonObject:
    name, number, protocol, application = port
    document: JsonObject = {"name": name, "port": number, "protocol": protocol}
    if application:
        document["appProtocol"] = application
    return document


def plan_endpoint_slices(
    service: JsonObject, pods: Sequence[JsonObject], slices: Sequence[JsonObject], zones: Mapping[str, str]
) -> list[Step]:
    """One pass for a Service; ``pods`` and ``slices`` are those of its namespace, ``zones`` by node name.

    Services without a selector (and ExternalName) are left to whoever made them.
    """
    existing = [piece for piece in controlled_by(service, slices) if not doomed(piece)]
    spec = service["spec"]
    if doomed(service) or not spec.get("selector") or spec.get("type") == "ExternalName":
        return [Delete(schema.ENDPOINT_SLICE, piece) for piece in existing]
    labels = {MANAGED_BY: MANAGER, SERVICE_NAME: service["metadata"]["name"]}
    if spec.get("clusterIP") == "None":
        labels[HEADLESS] = ""
    labels = {**service["metadata"].get("labels", {}), **labels}
    steps: list[Step] = []
    left: dict[tuple[str, _Ports], list[JsonObject]] = {}
    for piece in existing:
        left.setdefault(_slice_key(piece), []).append(piece)
    for key, endpoints in desired_slices(service, pods, zones).items():
        for start in range(0, max(len(endpoints), 1), ENDPOINTS_MAX):
            chunk = endpoints[start : start + ENDPOINTS_MAX]
            same = left.get(key)
            if same:
                piece = same.pop(0)
                if piece["endpoints"] != chunk or piece["metadata"].get("labels") != labels:
                    mine = copy.deepcopy(piece)
                    mine["endpoints"] = chunk
                    mine["metadata"]["labels"] = labels
                    steps.append(Write(schema.ENDPOINT_SLICE, mine))
                continue
            metadata = {
                "generateName": f"{service['metadata']['name'][:57]}-",
                "labels": labels,
                "ownerReferences": [owner_reference(service)],
            }
            made: JsonObject = {"metadata": metadata, "addressType": key[0], "endpoints": chunk}
            made["ports"] = [_port_document(port) for port in key[1]]
            steps.append(Create(schema.ENDPOINT_SLICE, service["metadata"]["namespace"], made, service))
    steps += [Delete(schema.ENDPOINT_SLICE, piece) for pieces in left.values() for piece in pieces]
    return steps


def plan_endpoints(service: JsonObject, pods: Sequence[JsonObject], existing: JsonObject | None) -> list[Step]:
    """The older Endpoints object, which `kubectl get endpoints` and `describe service` of old kubectls show.

    It holds the Service's first address family only, as in Kubernetes. One made by hand is left alone.
    """
    spec = service["spec"]
    if doomed(service) or not spec.get("selector") or spec.get("type") == "ExternalName":
        return []
    if existing is not None and not controlled_by(service, [existing]):
        return []
    family = spec.get("ipFamilies", ["IPv4"])[0]
    subsets = []
    for (found, ports), endpoints in desired_slices(service, pods, {}).items():
        if found != family or not endpoints:
            continue
        subset: JsonObject = {}
        for endpoint in endpoints:
            conditions = endpoint["conditions"]
            if conditions["terminating"] and not conditions["ready"]:
                continue
            address: JsonObject = {"ip": endpoint["addresses"][0]}
            for key in ("nodeName", "targetRef", "hostname"):
                if key in endpoint:
                    address[key] = endpoint[key]
            subset.setdefault("addresses" if conditions["ready"] else "notReadyAddresses", []).append(address)
        if subset:
            subset["ports"] = [
                {key: value for key, value in _port_document(port).items() if value != ""} for port in ports
            ]
            subsets.append(subset)
    wanted: JsonObject = {"subsets": subsets} if subsets else {}
    if existing is None:
        metadata = {"name": service["metadata"]["name"], "ownerReferences": [owner_reference(service)]}
        return [Create(schema.ENDPOINTS, service["metadata"]["namespace"], {"metadata": metadata, **wanted})]
    if existing.get("subsets", []) == subsets:
        return []
    kept = {key: value for key, value in existing.items() if key != "subsets"}
    return [Write(schema.ENDPOINTS, {**kept, **wanted})]
