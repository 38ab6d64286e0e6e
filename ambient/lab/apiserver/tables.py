"""Lists as the Table that `kubectl get` prints: the columns and words of a real server, per kind."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ambient.lab.apiserver.schema import Kind
from ambient.lab.apiserver.status import JsonObject

_CELL_MAX = 1024


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    type: str = "string"
    priority: int = 0
    """Above 0: shown with ``-o wide`` only."""


Cells = Callable[[JsonObject, datetime], list[Any]]


def age(obj: JsonObject, now: datetime) -> str:
    return duration_since(obj["metadata"].get("creationTimestamp"), now)


def duration_since(moment: Any, now: datetime) -> str:
    if not isinstance(moment, str) or not moment:
        return "<unknown>"
    try:
        seconds = int((now - datetime.fromisoformat(moment.replace("Z", "+00:00"))).total_seconds())
    except (ValueError, TypeError):
        return "<invalid>"
    return human_duration(seconds)


def human_duration(seconds: int) -> str:
    """Kubernetes' short form: ``12s``, ``3m5s``, ``42m``, ``5h7m``, ``2d3h``, ``12d``, ``2y35d``, ``9y``."""
    if seconds < -1:
        return "<invalid>"
    seconds = max(seconds, 0)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400

    def two(large: int, unit: str, small: int, small_unit: str) -> str:
        return f"{large}{unit}{small}{small_unit}" if small else f"{large}{unit}"

    if seconds < 120:
        return f"{seconds}s"
    if minutes < 10:
        return two(minutes, "m", seconds % 60, "s")
    if hours < 3:
        return f"{minutes}m"
    if hours < 8:
        return two(hours, "h", minutes % 60, "m")
    if hours < 48:
        return f"{hours}h"
    if days < 8:
        return two(days, "d", hours % 24, "h")
    if days < 730:
        return f"{days}d"
    if days < 2920:
        return two(days // 365, "y", days % 365, "d")
    return f"{days // 365}y"


def _join(items: Iterable[Any]) -> str:
    return ",".join(str(item) for item in items) or "<none>"


def _labels(labels: JsonObject | None) -> str:
    return _join(f"{key}={value}" for key, value in sorted((labels or {}).items()))


def _selector(selector: JsonObject | None) -> str:
    parts = [f"{key}={value}" for key, value in sorted(((selector or {}).get("matchLabels") or {}).items())]
    for expression in (selector or {}).get("matchExpressions") or ():
        key, operator = expression.get("key"), expression.get("operator")
        values = ",".join(expression.get("values") or ())
        parts.append(
            {"Exists": f"{key}", "DoesNotExist": f"!{key}"}.get(operator, f"{key} {str(operator).lower()} ({values})")
        )
    return _join(parts)


def pod_status(pod: JsonObject) -> str:
    """The STATUS column: the phase, unless a container has more to say or the pod is being deleted."""
    status = pod.get("status") or {}
    reason = str(status.get("reason") or status.get("phase") or "Unknown")
    initializing = False
    init_total = len(pod["spec"].get("initContainers") or ())
    for index, container in enumerate(status.get("initContainerStatuses") or ()):
        state = container.get("state") or {}
        ended, waiting = state.get("terminated"), state.get("waiting")
        if ended is not None and ended.get("exitCode", 0) == 0:
            continue
        initializing = True
        if ended is not None:
            reason = "Init:" + (ended.get("reason") or f"ExitCode:{ended.get('exitCode')}")
        elif waiting and waiting.get("reason") not in (None, "", "PodInitializing"):
            reason = f"Init:{waiting['reason']}"
        else:
            reason = f"Init:{index}/{init_total}"
        break
    if not initializing:
        running = False
        for container in reversed(status.get("containerStatuses") or ()):
            state = container.get("state") or {}
            ended, waiting = state.get("terminated"), state.get("waiting")
            if waiting and waiting.get("reason"):
                reason = str(waiting["reason"])
            elif ended is not None:
                reason = str(ended.get("reason") or f"ExitCode:{ended.get('exitCode', 0)}")
            elif container.get("ready") and "running" in state:
                running = True
        if reason == "Completed" and running:
            reason = "Running" if _condition(status, "Ready") == "True" else "NotReady"
    if "deletionTimestamp" in pod["metadata"]:
        return "Unknown" if status.get("reason") == "NodeLost" else "Terminating"
    return reason


def _condition(status: JsonObject, name: str) -> str:
    for condition in status.get("conditions") or ():
        if condition.get("type") == name:
            return str(condition.get("status"))
    return ""


def _pod(pod: JsonObject, now: datetime) -> list[Any]:
    status, spec = pod.get("status") or {}, pod["spec"]
    containers = status.get("containerStatuses") or ()
    ready = sum(bool(c.get("ready")) and "running" in (c.get("state") or {}) for c in containers)
    restarts = sum(int(c.get("restartCount") or 0) for c in containers)
    ends = [((c.get("lastState") or {}).get("terminated") or {}).get("finishedAt") for c in containers]
    last = max((end for end in ends if isinstance(end, str)), default="")
    shown = f"{restarts} ({duration_since(last, now)} ago)" if restarts and last else str(restarts)
    addresses = [entry.get("ip") for entry in status.get("podIPs") or () if entry.get("ip")]
    return [
        pod["metadata"]["name"],
        f"{ready}/{len(spec.get('containers') or ())}",
        pod_status(pod),
        shown,
        age(pod, now),
        addresses[0] if addresses else status.get("podIP") or "<none>",
        spec.get("nodeName") or "<none>",
        status.get("nominatedNodeName") or "<none>",
        "<none>",
    ]


def _node(node: JsonObject, now: datetime) -> list[Any]:
    status, labels = node.get("status") or {}, node["metadata"].get("labels") or {}
    ready = {"True": "Ready", "False": "NotReady"}.get(_condition(status, "Ready"), "Unknown")
    if (node.get("spec") or {}).get("unschedulable"):
        ready += ",SchedulingDisabled"
    prefix = "node-role.kubernetes.io/"
    roles = sorted(key.removeprefix(prefix) for key in labels if key.startswith(prefix) and key != prefix)
    info = status.get("nodeInfo") or {}

    def address(kind: str) -> str:
        found = [a.get("address") for a in status.get("addresses") or () if a.get("type") == kind]
        return str(found[0]) if found else "<none>"

    return [
        node["metadata"]["name"],
        ready,
        _join(roles),
        age(node, now),
        info.get("kubeletVersion") or "",
        address("InternalIP"),
        address("ExternalIP"),
        info.get("osImage") or "<unknown>",
        info.get("kernelVersion") or "<unknown>",
        info.get("containerRuntimeVersion") or "<unknown>",
    ]


def _service(service: JsonObject, now: datetime) -> list[Any]:
    spec = service["spec"]
    ports = []
    for port in spec.get("ports") or ():
        number = f"{port.get('port')}:{port['nodePort']}" if port.get("nodePort") else f"{port.get('port')}"
        ports.append(f"{number}/{port.get('protocol')}")
    external = [str(ip) for ip in spec.get("externalIPs") or ()]
    if spec.get("type") == "ExternalName":
        external = [spec.get("externalName") or "<none>"]
    elif spec.get("type") == "LoadBalancer":
        ingress = ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ()
        external += [str(entry.get("ip") or entry.get("hostname")) for entry in ingress]
        external = external or ["<pending>"]
    return [
        service["metadata"]["name"],
        spec.get("type"),
        spec.get("clusterIP") or "<none>",
        _join(external),
        _join(ports),
        age(service, now),
        _labels(spec.get("selector")),
    ]


def _workload_images(obj: JsonObject) -> list[str]:
    containers = obj["spec"]["template"]["spec"].get("containers") or ()
    return [
        _join(c.get("name") for c in containers),
        _join(c.get("image") for c in containers),
        _selector(obj["spec"].get("selector")),
    ]


def _deployment(obj: JsonObject, now: datetime) -> list[Any]:
    status = obj.get("status") or {}
    return [
        obj["metadata"]["name"],
        f"{status.get('readyReplicas', 0)}/{obj['spec'].get('replicas', 0)}",
        status.get("updatedReplicas", 0),
        status.get("availableReplicas", 0),
        age(obj, now),
        *_workload_images(obj),
    ]


def _replica_set(obj: JsonObject, now: datetime) -> list[Any]:
    status = obj.get("status") or {}
    return [
        obj["metadata"]["name"],
        obj["spec"].get("replicas", 0),
        status.get("replicas", 0),
        status.get("readyReplicas", 0),
        age(obj, now),
        *_workload_images(obj),
    ]


def _some(items: Sequence[str], limit: int) -> str:
    if len(items) <= limit:
        return _join(items)
    return f"{','.join(items[:limit])} + {len(items) - limit} more..."


def _endpoint_slice(obj: JsonObject, now: datetime) -> list[Any]:
    ports = [str(port.get("port") or "*") for port in obj.get("ports") or ()]
    addresses = [a for endpoint in obj.get("endpoints") or () for a in endpoint.get("addresses") or ()]
    shown_ports = _some(ports, 3) if ports else "<unset>"
    shown = _some(addresses, 3) if addresses else "<unset>"
    return [obj["metadata"]["name"], obj.get("addressType"), shown_ports, shown, age(obj, now)]


def _endpoints(obj: JsonObject, now: datetime) -> list[Any]:
    pairs = []
    for subset in obj.get("subsets") or ():
        ports: list[JsonObject] = subset.get("ports") or [{}]
        for port in ports:
            for address in subset.get("addresses") or ():
                host = f"[{address['ip']}]" if ":" in address["ip"] else address["ip"]
                pairs.append(f"{host}:{port['port']}" if "port" in port else address["ip"])
    return [obj["metadata"]["name"], _some(pairs, 3), age(obj, now)]


def _event(obj: JsonObject, now: datetime) -> list[Any]:
    involved = obj.get("involvedObject") or {}
    last = obj.get("lastTimestamp") or obj.get("eventTime") or obj["metadata"].get("creationTimestamp")
    source = obj.get("source") or {}
    first = obj.get("firstTimestamp") or last
    return [
        duration_since(last, now),
        obj.get("type"),
        obj.get("reason"),
        f"{str(involved.get('kind', '')).lower()}/{involved.get('name', '')}",
        str(obj.get("message", "")).strip(),
        _join(part for part in (source.get("component"), source.get("host")) if part),
        duration_since(first, now),
        obj.get("count", 1),
        obj["metadata"]["name"],
    ]


def _columns(*names: str, wide: Sequence[str] = ()) -> tuple[Column, ...]:
    return tuple(Column(name) for name in names) + tuple(Column(name, priority=1) for name in wide)


_WORKLOAD_WIDE = ("Containers", "Images", "Selector")
_TABLES: dict[str, tuple[tuple[Column, ...], Cells]] = {
    "pods": (
        _columns(
            "Name", "Ready", "Status", "Restarts", "Age", wide=("IP", "Node", "Nominated Node", "Readiness Gates")
        ),
        _pod,
    ),
    "nodes": (
        _columns(
            "Name",
            "Status",
            "Roles",
            "Age",
            "Version",
            wide=("Internal-IP", "External-IP", "OS-Image", "Kernel-Version", "Container-Runtime"),
        ),
        _node,
    ),
    "namespaces": (
        _columns("Name", "Status", "Age"),
        lambda o, now: [o["metadata"]["name"], (o.get("status") or {}).get("phase"), age(o, now)],
    ),
    "services": (
        _columns("Name", "Type", "Cluster-IP", "External-IP", "Port(s)", "Age", wide=("Selector",)),
        _service,
    ),
    "serviceaccounts": (
        _columns("Name", "Secrets", "Age"),
        lambda o, now: [o["metadata"]["name"], len(o.get("secrets") or ()), age(o, now)],
    ),
    "configmaps": (
        _columns("Name", "Data", "Age"),
        lambda o, now: [
            o["metadata"]["name"],
            len(o.get("data") or ()) + len(o.get("binaryData") or ()),
            age(o, now),
        ],
    ),
    "secrets": (
        _columns("Name", "Type", "Data", "Age"),
        lambda o, now: [o["metadata"]["name"], o.get("type"), len(o.get("data") or ()), age(o, now)],
    ),
    "endpoints": (_columns("Name", "Endpoints", "Age"), _endpoints),
    "endpointslices.discovery.k8s.io": (
        _columns("Name", "AddressType", "Ports", "Endpoints", "Age"),
        _endpoint_slice,
    ),
    "events": (
        _columns("Last Seen", "Type", "Reason", "Object", "Message", wide=("Source", "First Seen", "Count", "Name")),
        _event,
    ),
    "leases.coordination.k8s.io": (
        _columns("Name", "Holder", "Age"),
        lambda o, now: [o["metadata"]["name"], (o.get("spec") or {}).get("holderIdentity") or "", age(o, now)],
    ),
    "deployments.apps": (
        _columns("Name", "Ready", "Up-to-date", "Available", "Age", wide=_WORKLOAD_WIDE),
        _deployment,
    ),
    "replicasets.apps": (
        _columns("Name", "Desired", "Current", "Ready", "Age", wide=_WORKLOAD_WIDE),
        _replica_set,
    ),
    "customresourcedefinitions.apiextensions.k8s.io": (
        _columns("Name", "Created At"),
        lambda o, now: [o["metadata"]["name"], o["metadata"].get("creationTimestamp")],
    ),
}

_STEP = re.compile(r"\.([A-Za-z0-9_-]+)|\['([^']+)'\]|\[(\*|\d+)\]|\[\?\(@\.([\w.]+)==[\"']([^\"']*)[\"']\)\]")


def json_path(obj: Any, path: str) -> list[Any]:
    """The values at a JSON path, for the forms that printer columns use: fields, indexes, ``[*]``, equality filters."""
    position, values = 0, [obj]
    path = path if path.startswith((".", "[")) else "." + path
    while position < len(path):
        step = _STEP.match(path, position)
        if step is None:
            return []
        position = step.end()
        name = (step[1] or step[2] or "").replace("\\.", ".")
        found: list[Any] = []
        for value in values:
            if name:
                if isinstance(value, dict) and name in value:
                    found.append(value[name])
            elif isinstance(value, list):
                if step[3] == "*":
                    found += value
                elif step[3]:
                    found += value[int(step[3]) : int(step[3]) + 1]
                else:
                    found += [item for item in value if json_path(item, "." + step[4]) == [step[5]]]
        values = found
    return values


def _custom_cells(columns: Sequence[tuple[str, str, str, int]]) -> Cells:
    def cells(obj: JsonObject, now: datetime) -> list[Any]:
        row: list[Any] = [obj["metadata"]["name"]]
        for _, column_type, path, _ in columns:
            values = json_path(obj, path)
            if not values:
                row.append("")
            elif column_type == "date":
                row.append(duration_since(values[0], now))
            elif column_type in ("integer", "number", "boolean"):
                row.append(values[0])
            else:
                shown = values[0] if len(values) == 1 else values
                text = str(shown).replace("'", '"') if isinstance(shown, list | dict) else str(shown)
                row.append(text[:_CELL_MAX])
        return row

    return cells


def _layout(kind: Kind) -> tuple[tuple[Column, ...], Cells]:
    if kind.resource in _TABLES:
        return _TABLES[kind.resource]
    columns = kind.columns or (("Age", "date", ".metadata.creationTimestamp", 0),)
    made = (Column("Name"), *(Column(name, "string" if t == "date" else t, p) for name, t, _, p in columns))
    return made, _custom_cells(columns)


def table(
    kind: Kind,
    objects: Iterable[JsonObject],
    now: datetime,
    *,
    metadata: JsonObject,
    include_object: str = "Metadata",
    headers: bool = True,
    version: str = "v1",
) -> JsonObject:
    """The Table document. ``include_object`` is Metadata, Object or None; ``headers`` False after a watch's first."""
    columns, cells = _layout(kind)
    rows = []
    for obj in objects:
        row: JsonObject = {"cells": cells(obj, now)}
        if include_object == "Object":
            row["object"] = obj
        elif include_object != "None":
            row["object"] = {
                "kind": "PartialObjectMetadata",
                "apiVersion": f"meta.k8s.io/{version}",
                "metadata": obj["metadata"],
            }
        rows.append(row)
    definitions = [
        {
            "name": column.name,
            "type": column.type,
            "format": "name" if column.name == "Name" else "",
            "description": column.name,
            "priority": column.priority,
        }
        for column in columns
    ]
    return {
        "kind": "Table",
        "apiVersion": f"meta.k8s.io/{version}",
        "metadata": metadata,
        "columnDefinitions": definitions if headers else None,
        "rows": rows,
    }
