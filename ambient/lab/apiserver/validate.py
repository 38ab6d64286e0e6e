"""What an object must satisfy to be stored, and which of its fields may not change. Causes, never exceptions."""

from __future__ import annotations

import base64
import binascii
import ipaddress
from collections.abc import Iterable
from typing import Any

from ambient.lab.apiserver.names import check_labels, check_metadata, dns_label, dns_subdomain, port_name
from ambient.lab.apiserver.schema import Kind
from ambient.lab.apiserver.status import (
    Cause,
    JsonObject,
    duplicate,
    forbidden_field,
    invalid_value,
    not_supported,
    required,
)

_PROTOCOLS = ("SCTP", "TCP", "UDP")
_SERVICE_TYPES = ("ClusterIP", "ExternalName", "LoadBalancer", "NodePort")
_DATA_BYTES_MAX = 1024 * 1024


def validate(kind: Kind, obj: JsonObject) -> list[Cause]:
    """Every broken rule of an object with defaults filled in; empty when it may be stored."""
    causes = check_metadata(kind, obj)
    match kind.resource:
        case "pods":
            causes += _pod_spec(obj["spec"], "spec")
        case "services":
            causes += _service(obj)
        case "deployments.apps" | "replicasets.apps":
            causes += _workload(obj)
        case "endpointslices.discovery.k8s.io":
            causes += _endpoint_slice(obj)
        case "configmaps" | "secrets":
            causes += _data(kind, obj)
        case "customresourcedefinitions.apiextensions.k8s.io":
            causes += _definition(obj)
    return causes


def validate_update(kind: Kind, new: JsonObject, old: JsonObject) -> list[Cause]:
    """Rules about what may not change."""
    causes: list[Cause] = []
    match kind.resource:
        case "pods":
            if _mutable_pod(new["spec"]) != _mutable_pod(old["spec"]):
                causes.append(
                    forbidden_field(
                        "spec",
                        "pod updates may not change fields other than `spec.containers[*].image`,"
                        "`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only "
                        "additions to existing tolerations),`spec.terminationGracePeriodSeconds`",
                    )
                )
        case "deployments.apps" | "replicasets.apps":
            if new["spec"].get("selector") != old["spec"].get("selector"):
                causes.append(invalid_value("spec.selector", new["spec"].get("selector"), "field is immutable"))
        case "endpointslices.discovery.k8s.io":
            if new.get("addressType") != old.get("addressType"):
                causes.append(invalid_value("addressType", new.get("addressType"), "field is immutable"))
        case "secrets":
            if new.get("type") != old.get("type"):
                causes.append(invalid_value("type", new.get("type"), "field is immutable"))
        case "customresourcedefinitions.apiextensions.k8s.io":
            for field in ("group", "scope"):
                if new["spec"].get(field) != old["spec"].get(field):
                    causes.append(invalid_value(f"spec.{field}", new["spec"].get(field), "field is immutable"))
    if kind.resource in ("configmaps", "secrets") and old.get("immutable"):
        for field in ("data", "binaryData", "immutable"):
            if new.get(field) != old.get(field):
                causes.append(forbidden_field(field, "field is immutable when `immutable` is set"))
    return causes


def _mutable_pod(spec: JsonObject) -> JsonObject:
    kept = {
        key: value
        for key, value in spec.items()
        if key not in ("activeDeadlineSeconds", "tolerations", "terminationGracePeriodSeconds")
    }
    for name in ("containers", "initContainers"):
        if name in kept:
            kept[name] = [{k: v for k, v in c.items() if k not in ("image", "imagePullPolicy")} for c in kept[name]]
    return kept


def _port_number(field: str, value: Any) -> list[Cause]:
    if isinstance(value, int) and 1 <= value <= 65535:
        return []
    return [invalid_value(field, value, "must be between 1 and 65535, inclusive")]


def _target_port(field: str, value: Any) -> list[Cause]:
    if isinstance(value, str):
        return [invalid_value(field, value, rule) for rule in port_name(value)]
    return _port_number(field, value)


def _unique(items: Iterable[JsonObject], field: str, key: str) -> list[Cause]:
    seen: set[Any] = set()
    causes = []
    for index, item in enumerate(items):
        value = item.get(key)
        if value is not None and value in seen:
            causes.append(duplicate(f"{field}[{index}].{key}", value))
        seen.add(value)
    return causes


def _pod_spec(spec: JsonObject, where: str) -> list[Cause]:
    causes: list[Cause] = []
    if not spec.get("containers"):
        causes.append(required(f"{where}.containers"))
    volumes = {volume.get("name") for volume in spec.get("volumes", ())}
    causes += _unique(spec.get("volumes", ()), f"{where}.volumes", "name")
    for name in ("initContainers", "containers"):
        for index, container in enumerate(spec.get(name, ())):
            causes += _container(container, f"{where}.{name}[{index}]", volumes)
    both = [*spec.get("initContainers", ()), *spec.get("containers", ())]
    causes += _unique(both, f"{where}.containers", "name")
    if spec.get("restartPolicy") not in ("Always", "OnFailure", "Never"):
        causes.append(
            not_supported(f"{where}.restartPolicy", spec.get("restartPolicy"), ("Always", "OnFailure", "Never"))
        )
    grace = spec.get("terminationGracePeriodSeconds", 0)
    if grace < 0:
        causes.append(invalid_value(f"{where}.terminationGracePeriodSeconds", grace, "must be non-negative"))
    for name in ("serviceAccountName", "nodeName"):
        if spec.get(name):
            causes += [invalid_value(f"{where}.{name}", spec[name], rule) for rule in dns_subdomain(spec[name])]
    for name in ("hostname", "subdomain"):
        if spec.get(name):
            causes += [invalid_value(f"{where}.{name}", spec[name], rule) for rule in dns_label(spec[name])]
    return causes + check_labels(spec.get("nodeSelector", {}), f"{where}.nodeSelector")


def _container(container: JsonObject, where: str, volumes: set[Any]) -> list[Cause]:
    causes: list[Cause] = []
    if not container.get("name"):
        causes.append(required(f"{where}.name"))
    else:
        causes += [invalid_value(f"{where}.name", container["name"], rule) for rule in dns_label(container["name"])]
    if not container.get("image"):
        causes.append(required(f"{where}.image"))
    ports = container.get("ports", ())
    for index, port in enumerate(ports):
        field = f"{where}.ports[{index}]"
        causes += _port_number(f"{field}.containerPort", port.get("containerPort"))
        if port.get("protocol") not in _PROTOCOLS:
            causes.append(not_supported(f"{field}.protocol", port.get("protocol"), _PROTOCOLS))
        if port.get("name"):
            causes += [invalid_value(f"{field}.name", port["name"], rule) for rule in port_name(port["name"])]
    causes += _unique([port for port in ports if port.get("name")], f"{where}.ports", "name")
    for index, entry in enumerate(container.get("env", ())):
        if not entry.get("name"):
            causes.append(required(f"{where}.env[{index}].name"))
    for index, mount in enumerate(container.get("volumeMounts", ())):
        field = f"{where}.volumeMounts[{index}]"
        if mount.get("name") not in volumes:
            causes.append(Cause(f"{field}.name", f'Not found: "{mount.get("name")}"', "FieldValueNotFound"))
        if not mount.get("mountPath"):
            causes.append(required(f"{field}.mountPath"))
    for name in ("livenessProbe", "readinessProbe", "startupProbe"):
        if name in container:
            causes += _probe(container[name], f"{where}.{name}")
    return causes


def _probe(probe: JsonObject, where: str) -> list[Cause]:
    kinds = [name for name in ("exec", "httpGet", "tcpSocket", "grpc") if name in probe]
    if not kinds:
        return [required(where, "must specify a handler type")]
    causes = [forbidden_field(f"{where}.{name}", "may not specify more than 1 handler type") for name in kinds[1:]]
    for name in ("httpGet", "tcpSocket", "grpc"):
        if name in probe:
            causes += _target_port(f"{where}.{name}.port", probe[name].get("port"))
    for name in ("timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"):
        if probe[name] < 1:
            causes.append(invalid_value(f"{where}.{name}", probe[name], "must be greater than 0"))
    return causes


def _service(obj: JsonObject) -> list[Cause]:
    spec = obj["spec"]
    causes = check_labels(spec.get("selector", {}), "spec.selector")
    kind = spec["type"]
    if kind not in _SERVICE_TYPES:
        causes.append(not_supported("spec.type", kind, _SERVICE_TYPES))
    ports = spec.get("ports", [])
    headless = spec.get("clusterIP") == "None"
    if kind == "ExternalName":
        if not spec.get("externalName"):
            causes.append(required("spec.externalName"))
    elif not ports and not headless:
        causes.append(required("spec.ports"))
    if headless and kind not in ("ClusterIP", "ExternalName"):
        causes.append(invalid_value("spec.clusterIPs[0]", "None", f"may not be set to 'None' for {kind} services"))
    for index, port in enumerate(ports):
        where = f"spec.ports[{index}]"
        if len(ports) > 1 and not port.get("name"):
            causes.append(required(f"{where}.name"))
        elif port.get("name"):
            causes += [invalid_value(f"{where}.name", port["name"], rule) for rule in dns_label(port["name"])]
        causes += _port_number(f"{where}.port", port.get("port"))
        if "port" in port:
            causes += _target_port(f"{where}.targetPort", port["targetPort"])
        if port["protocol"] not in _PROTOCOLS:
            causes.append(not_supported(f"{where}.protocol", port["protocol"], _PROTOCOLS))
        if port.get("nodePort") and kind not in ("NodePort", "LoadBalancer"):
            causes.append(forbidden_field(f"{where}.nodePort", "may not be used when `type` is 'ClusterIP'"))
    causes += _unique([port for port in ports if port.get("name")], "spec.ports", "name")
    pairs = [{"port": (port.get("port"), port["protocol"])} for port in ports]
    return causes + _unique(pairs, "spec.ports", "port")


def _workload(obj: JsonObject) -> list[Cause]:
    spec = obj["spec"]
    causes: list[Cause] = []
    if spec["replicas"] < 0:
        causes.append(invalid_value("spec.replicas", spec["replicas"], "must be greater than or equal to 0"))
    selector = spec.get("selector")
    labels = spec["template"].get("metadata", {}).get("labels", {})
    if not selector or not (selector.get("matchLabels") or selector.get("matchExpressions")):
        causes.append(required("spec.selector"))
    else:
        causes += check_selector(selector, "spec.selector")
        matched = selector.get("matchLabels", {}).items() <= labels.items()
        if not causes and not matched:
            rule = "`selector` does not match template `labels`"
            causes.append(invalid_value("spec.template.metadata.labels", labels, rule))
    causes += check_labels(labels, "spec.template.metadata.labels")
    causes += _pod_spec(spec["template"]["spec"], "spec.template.spec")
    if spec["template"]["spec"].get("restartPolicy") in ("OnFailure", "Never"):
        value = spec["template"]["spec"]["restartPolicy"]
        causes.append(not_supported("spec.template.spec.restartPolicy", value, ("Always",)))
    return causes


def check_selector(selector: JsonObject, where: str) -> list[Cause]:
    causes = check_labels(selector.get("matchLabels", {}), f"{where}.matchLabels")
    operators = ("DoesNotExist", "Exists", "In", "NotIn")
    for index, expression in enumerate(selector.get("matchExpressions", ())):
        field = f"{where}.matchExpressions[{index}]"
        operator = expression.get("operator")
        if operator not in operators:
            causes.append(not_supported(f"{field}.operator", operator, operators))
        elif operator in ("In", "NotIn") and not expression.get("values"):
            causes.append(required(f"{field}.values", "must be specified when `operator` is 'In' or 'NotIn'"))
        if not expression.get("key"):
            causes.append(required(f"{field}.key"))
    return causes


def _endpoint_slice(obj: JsonObject) -> list[Cause]:
    causes: list[Cause] = []
    family = obj.get("addressType")
    if family not in ("FQDN", "IPv4", "IPv6"):
        return [not_supported("addressType", family, ("FQDN", "IPv4", "IPv6"))]
    for index, endpoint in enumerate(obj["endpoints"]):
        where = f"endpoints[{index}].addresses"
        if not endpoint.get("addresses"):
            causes.append(required(where, "must contain at least 1 address"))
        for position, address in enumerate(endpoint.get("addresses", ())):
            if family == "FQDN":
                continue
            try:
                ok = ipaddress.ip_address(address).version == (4 if family == "IPv4" else 6)
            except ValueError:
                ok = False
            if not ok:
                causes.append(invalid_value(f"{where}[{position}]", address, f"must be a valid {family} address"))
    if len(obj["endpoints"]) > 1000:
        causes.append(Cause("endpoints", "Too many: must have at most 1000 items", "FieldValueTooMany"))
    return causes


def _data(kind: Kind, obj: JsonObject) -> list[Cause]:
    causes: list[Cause] = []
    size = 0
    for field in ("data", "binaryData"):
        for key, value in obj.get(field, {}).items():
            size += len(value)
            if not key or len(key) > 253 or not all(c.isalnum() or c in "-_." for c in key):
                rule = "a valid config key must consist of alphanumeric characters, '-', '_' or '.'"
                causes.append(invalid_value(f"{field}[{key}]", key, rule))
            if kind.resource == "secrets" or field == "binaryData":
                try:
                    base64.b64decode(value, validate=True)
                except (binascii.Error, ValueError):
                    causes.append(invalid_value(f"{field}[{key}]", "...", "must be base64"))
    if size > _DATA_BYTES_MAX:
        causes.append(Cause("data", f"Too long: must have at most {_DATA_BYTES_MAX} bytes", "FieldValueTooLong"))
    return causes


def _definition(obj: JsonObject) -> list[Cause]:
    spec = obj.get("spec") or {}
    names = spec.get("names") or {}
    causes = [required(f"spec.names.{key}") for key in ("kind", "plural") if not names.get(key)]
    if not spec.get("group"):
        causes.append(required("spec.group"))
    if spec.get("scope") not in ("Cluster", "Namespaced"):
        causes.append(not_supported("spec.scope", spec.get("scope"), ("Cluster", "Namespaced")))
    versions = spec.get("versions") or []
    if not versions or not all(version.get("name") for version in versions):
        causes.append(required("spec.versions", "at least one version, each with a name"))
    elif sum(bool(version.get("storage")) for version in versions) != 1:
        causes.append(invalid_value("spec.versions", versions, "must have exactly one version marked as storage"))
    elif not any(version.get("served") for version in versions):
        causes.append(invalid_value("spec.versions", versions, "must have at least one served version"))
    for index, version in enumerate(versions):
        for position, column in enumerate(version.get("additionalPrinterColumns", ())):
            field = f"spec.versions[{index}].additionalPrinterColumns[{position}]"
            causes += [required(f"{field}.{key}") for key in ("name", "jsonPath") if not column.get(key)]
    expected = f"{names.get('plural')}.{spec.get('group')}"
    if not causes and obj["metadata"].get("name") != expected:
        causes.append(invalid_value("metadata.name", obj["metadata"].get("name"), f"must be {expected}"))
    return causes
