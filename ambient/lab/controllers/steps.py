"""What controllers decide: steps as values, and the one place that performs them on the store.

Plans are level-triggered: made from what is, never from what changed, so a step that fails (a conflict, an
object gone meanwhile) is simply planned again at the next pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from ambient.lab.apiserver import schema
from ambient.lab.apiserver.moments import timestamp
from ambient.lab.apiserver.schema import Kind
from ambient.lab.apiserver.status import ApiError, JsonObject
from ambient.lab.apiserver.store import DeleteOptions, Store

EVENTS_MAX = 1000
"""Event objects kept in the cluster; the oldest go first."""


@dataclass(frozen=True, slots=True)
class Create:
    kind: Kind
    namespace: str
    obj: JsonObject
    on_behalf: JsonObject | None = None
    """The object a failure is reported on, as an Event FailedCreate."""


@dataclass(frozen=True, slots=True)
class Write:
    """Replace an object read before; refused by the store if it changed since."""

    kind: Kind
    obj: JsonObject
    subresource: str = ""


@dataclass(frozen=True, slots=True)
class Delete:
    kind: Kind
    obj: JsonObject
    grace_s: int | None = None
    foreground: bool = False


@dataclass(frozen=True, slots=True)
class Bind:
    pod: JsonObject
    node: str


@dataclass(frozen=True, slots=True)
class Finalize:
    namespace: str


@dataclass(frozen=True, slots=True)
class Note:
    """Record an Event about an object; repeated ones are counted, not added."""

    about: JsonObject
    reason: str
    message: str
    component: str
    warning: bool = False


Step = Create | Write | Delete | Bind | Finalize | Note


def perform(store: Store, step: Step) -> None:
    """Perform one step. Raises ApiError when the store refuses it."""
    match step:
        case Create(kind, namespace, obj, on_behalf):
            try:
                store.create(kind, namespace, obj)
            except ApiError as error:
                if on_behalf is not None:
                    note(store, Note(on_behalf, "FailedCreate", f"Error creating: {error}", "controllers", True))
                raise
        case Write(kind, obj, subresource):
            metadata = obj["metadata"]
            store.replace(kind, metadata.get("namespace", ""), metadata["name"], obj, subresource=subresource)
        case Delete(kind, obj, grace_s, foreground):
            metadata = obj["metadata"]
            propagation = "Foreground" if foreground else "Background"
            options = DeleteOptions(grace_s, metadata["uid"], propagation=propagation)
            store.delete(kind, metadata.get("namespace", ""), metadata["name"], options)
        case Bind(pod, node):
            metadata = pod["metadata"]
            store.bind(metadata["namespace"], metadata["name"], node)
        case Finalize(namespace):
            store.finalize_namespace(namespace)
        case Note():
            note(store, step)


def note(store: Store, event: Note) -> None:
    """Create or count an Event. An event that cannot be stored (its namespace is going) is dropped."""
    about = event.about["metadata"]
    namespace = about.get("namespace", "default")
    digest = hashlib.sha256(f"{about['uid']}/{event.reason}/{event.message}".encode()).hexdigest()[:16]
    name = f"{about['name'][:200]}.{digest}"
    now = timestamp(store.now)
    try:
        if store.find(schema.EVENT, namespace, name) is not None:

            def count(obj: JsonObject) -> None:
                obj["count"] = obj.get("count", 1) + 1
                obj["lastTimestamp"] = now

            store.modify(schema.EVENT, namespace, name, count)
            return
        store.create(
            schema.EVENT,
            namespace,
            {
                "metadata": {"name": name},
                "involvedObject": {
                    "kind": event.about["kind"],
                    "apiVersion": event.about["apiVersion"],
                    "namespace": namespace,
                    "name": about["name"],
                    "uid": about["uid"],
                },
                "reason": event.reason,
                "message": event.message[:1024],
                "type": "Warning" if event.warning else "Normal",
                "source": {"component": event.component},
                "firstTimestamp": now,
                "lastTimestamp": now,
                "count": 1,
            },
        )
        events = store.all(schema.EVENT)
        if len(events) > EVENTS_MAX:
            oldest = min(events, key=lambda e: str(e.get("lastTimestamp", "")))["metadata"]
            store.delete(schema.EVENT, oldest["namespace"], oldest["name"])
    except ApiError:
        return


def owner_reference(owner: JsonObject) -> JsonObject:
    """The ownerReference of a controller's child."""
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def controlled_by(owner: JsonObject, objects: Iterable[JsonObject]) -> list[JsonObject]:
    """Those of ``objects`` whose controller is ``owner``."""
    uid = owner["metadata"]["uid"]
    return [
        obj
        for obj in objects
        if any(ref["uid"] == uid and ref.get("controller") for ref in obj["metadata"].get("ownerReferences", ()))
    ]


def condition(obj: JsonObject, name: str) -> JsonObject | None:
    for entry in obj.get("status", {}).get("conditions", ()):
        if entry["type"] == name:
            return dict(entry)
    return None


def with_condition(obj: JsonObject, name: str, status: str, reason: str, message: str, now: datetime) -> JsonObject:
    """The status of ``obj`` with one condition set; its transition time moves only when the status word changes."""
    old = condition(obj, name)
    moved = old is None or old["status"] != status
    entry = {
        "type": name,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": timestamp(now) if moved or old is None else old.get("lastTransitionTime"),
    }
    current = obj.get("status", {})
    others = [c for c in current.get("conditions", ()) if c["type"] != name]
    return {**current, "conditions": [*others, entry]}


def doomed(obj: JsonObject) -> bool:
    """Whether deletion has begun."""
    return "deletionTimestamp" in obj["metadata"]


def pod_ready(pod: JsonObject) -> bool:
    found = condition(pod, "Ready")
    return found is not None and found["status"] == "True"


def pod_active(pod: JsonObject) -> bool:
    """Neither ended nor being deleted."""
    return not doomed(pod) and pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")
