"""What goes when something else is gone: contents of namespaces, dependents of owners, pods of lost nodes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

from ambient.lab.apiserver import schema
from ambient.lab.apiserver.schema import Kind
from ambient.lab.apiserver.status import JsonObject
from ambient.lab.controllers.steps import Create, Delete, Finalize, Step, Write, doomed

FOREGROUND = "foregroundDeletion"

Found = tuple[Kind, JsonObject]
OwnerExists = Callable[[str, JsonObject], bool | None]
"""Namespace of the dependent and its ownerReference to: exists, is gone, or (None) cannot be told."""


def plan_namespace(namespace: JsonObject, contents: Iterable[Found]) -> list[Step]:
    """Empty and finalize a namespace being deleted; see that any other has its default service account."""
    name = namespace["metadata"]["name"]
    held = list(contents)
    if not doomed(namespace):
        if any(kind is schema.SERVICE_ACCOUNT and obj["metadata"]["name"] == "default" for kind, obj in held):
            return []
        return [Create(schema.SERVICE_ACCOUNT, name, {"metadata": {"name": "default"}})]
    if not held:
        return [Finalize(name)]
    # Controllers' parents first, so that nothing deleted here is created again.
    first = {"deployments.apps": 0, "replicasets.apps": 1, "services": 2}
    going = sorted(held, key=lambda found: first.get(found[0].resource, 9))
    return [Delete(kind, obj) for kind, obj in going if not doomed(obj)]


def plan_garbage(objects: Sequence[Found], owner_exists: OwnerExists) -> list[Step]:
    """Delete objects all of whose owners are gone; carry on foreground deletions."""
    steps: list[Step] = []
    dependents: dict[str, list[Found]] = {}
    for kind, obj in objects:
        for reference in obj["metadata"].get("ownerReferences", ()):
            dependents.setdefault(reference["uid"], []).append((kind, obj))
    for kind, obj in objects:
        metadata = obj["metadata"]
        owners = metadata.get("ownerReferences", ())
        namespace = metadata.get("namespace", "")
        if owners and not doomed(obj) and all(owner_exists(namespace, reference) is False for reference in owners):
            steps.append(Delete(kind, obj))
        if doomed(obj) and FOREGROUND in metadata.get("finalizers", ()):
            below = dependents.get(metadata["uid"], [])
            if below:
                steps += [Delete(k, child, foreground=True) for k, child in below if not doomed(child)]
            else:
                mine = copy.deepcopy(obj)
                mine["metadata"]["finalizers"] = [f for f in metadata["finalizers"] if f != FOREGROUND]
                steps.append(Write(kind, mine))
    return steps


def plan_lost_pods(pods: Sequence[JsonObject], nodes: Sequence[JsonObject]) -> list[Step]:
    """Pods being deleted whose node is gone have no kubelet to remove them."""
    names = {node["metadata"]["name"] for node in nodes}
    return [
        Delete(schema.POD, pod, grace_s=0)
        for pod in pods
        if doomed(pod) and pod["spec"].get("nodeName") and pod["spec"]["nodeName"] not in names
    ]
