"""Deployments keep ReplicaSets, ReplicaSets keep pods: names, owners and rollouts as in a real cluster."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from ambient.lab.apiserver import schema
from ambient.lab.apiserver.status import JsonObject
from ambient.lab.controllers.steps import (
    Create,
    Delete,
    Note,
    Step,
    Write,
    controlled_by,
    doomed,
    owner_reference,
    pod_active,
    pod_ready,
    with_condition,
)

HASH_LABEL = "pod-template-hash"
REVISION = "deployment.kubernetes.io/revision"
BURST_MAX = 50
"""Pods created or deleted for one ReplicaSet in one pass."""
_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"


def template_hash(template: JsonObject) -> str:
    """Ten characters that depend on the pod template only."""
    digest = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).digest()
    return "".join(_ALPHABET[byte % len(_ALPHABET)] for byte in digest[:10])


def _amount(value: Any, total: int, *, up: bool) -> int:
    """A number or percentage of ``total``; what cannot be read counts as a quarter."""
    if isinstance(value, str):
        digits = value.removesuffix("%")
        share = total * (int(digits) if digits.isdigit() and value.endswith("%") else 25) / 100
        return math.ceil(share) if up else math.floor(share)
    return int(value) if isinstance(value, int) else 1


def _limits(deployment: JsonObject) -> tuple[int, int]:
    """How many pods may exist at most and must be available at least during a rollout."""
    replicas = deployment["spec"]["replicas"]
    rolling = deployment["spec"].get("strategy", {}).get("rollingUpdate", {})
    surge = _amount(rolling.get("maxSurge", 1), replicas, up=True)
    missing = _amount(rolling.get("maxUnavailable", 0), replicas, up=False)
    if surge == 0 and missing == 0:
        missing = 1
    return replicas + surge, max(replicas - missing, 0)


def _revision(obj: JsonObject) -> int:
    text = str(obj["metadata"].get("annotations", {}).get(REVISION, "0"))
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0


def _scaled(replica_set: JsonObject, replicas: int) -> Write:
    mine = copy.deepcopy(replica_set)
    mine["spec"]["replicas"] = replicas
    return Write(schema.REPLICA_SET, mine)


def _new_replica_set(deployment: JsonObject, digest: str, replicas: int, revision: int) -> JsonObject:
    template = copy.deepcopy(deployment["spec"]["template"])
    template["metadata"] = {**template.get("metadata", {})}
    template["metadata"]["labels"] = {**template["metadata"].get("labels", {}), HASH_LABEL: digest}
    selector = copy.deepcopy(deployment["spec"]["selector"])
    selector["matchLabels"] = {**selector.get("matchLabels", {}), HASH_LABEL: digest}
    metadata = deployment["metadata"]
    return {
        "metadata": {
            "name": f"{metadata['name'][:240]}-{digest}",
            "labels": dict(template["metadata"]["labels"]),
            "annotations": {REVISION: str(revision)},
            "ownerReferences": [owner_reference(deployment)],
        },
        "spec": {"replicas": replicas, "selector": selector, "template": template},
    }


def plan_deployment(
    deployment: JsonObject, replica_sets: Sequence[JsonObject], pods: Sequence[JsonObject], now: datetime
) -> list[Step]:
    """One pass for a Deployment; ``replica_sets`` and ``pods`` are those of its namespace."""
    if doomed(deployment):
        return []
    owned = [rs for rs in controlled_by(deployment, replica_sets) if not doomed(rs)]
    digest = template_hash(deployment["spec"]["template"])
    new = next((rs for rs in owned if rs["spec"]["selector"].get("matchLabels", {}).get(HASH_LABEL) == digest), None)
    old = [rs for rs in owned if rs is not new]
    steps: list[Step] = []
    if not deployment["spec"].get("paused"):
        steps = _rollout(deployment, new, old, pods, digest)
    revision = max([_revision(rs) for rs in owned], default=0)
    if new is not None and _revision(new) < revision:  # rolled back: an earlier template is the newest again
        mine = copy.deepcopy(new)
        mine["metadata"].setdefault("annotations", {})[REVISION] = str(revision + 1)
        return [Write(schema.REPLICA_SET, mine)]
    if new is not None and deployment["metadata"].get("annotations", {}).get(REVISION) != str(revision):
        mine = copy.deepcopy(deployment)
        mine["metadata"].setdefault("annotations", {})[REVISION] = str(revision)
        return [Write(schema.DEPLOYMENT, mine)]
    spent = [rs for rs in old if rs["spec"]["replicas"] == 0 and not controlled_by(rs, pods)]
    excess = len(spent) - deployment["spec"].get("revisionHistoryLimit", 10)
    for rs in sorted(spent, key=_revision)[: max(excess, 0)]:
        steps.append(Delete(schema.REPLICA_SET, rs))
    status = _deployment_status(deployment, new, owned, now)
    if status != deployment.get("status"):
        steps.append(Write(schema.DEPLOYMENT, {**deployment, "status": status}, "status"))
    return steps


def _rollout(
    deployment: JsonObject,
    new: JsonObject | None,
    old: Sequence[JsonObject],
    pods: Sequence[JsonObject],
    digest: str,
) -> list[Step]:
    replicas = deployment["spec"]["replicas"]
    most, least = _limits(deployment)
    running_old = [rs for rs in old if rs["spec"]["replicas"] > 0]
    old_total = sum(rs["spec"]["replicas"] for rs in running_old)
    if deployment["spec"].get("strategy", {}).get("type") == "Recreate":
        if running_old:
            return [_scaled(rs, 0) for rs in running_old]
        if any(controlled_by(rs, pods) for rs in old):
            return []  # the old pods go first
        target = replicas
    else:
        target = min(replicas, max(most - old_total, new["spec"]["replicas"] if new else 0))
    if new is None:
        revision = max([_revision(rs) for rs in old], default=0) + 1
        made = _new_replica_set(deployment, digest, target, revision)
        namespace = deployment["metadata"]["namespace"]
        message = f"Scaled up replica set {made['metadata']['name']} from 0 to {target}"
        return [
            Create(schema.REPLICA_SET, namespace, made, deployment),
            Note(deployment, "ScalingReplicaSet", message, "deployment-controller"),
        ]
    steps: list[Step] = []
    if new["spec"]["replicas"] != target:
        steps.append(_scaled(new, target))
    if running_old:
        available = sum(1 for rs in (new, *running_old) for pod in controlled_by(rs, pods) if _available(pod))
        spare = max(available - least, 0)
        # Old pods that serve nobody go without being counted; those that do go as new ones become available.
        for rs in sorted(running_old, key=_revision):
            serving = sum(1 for pod in controlled_by(rs, pods) if _available(pod))
            idle = max(rs["spec"]["replicas"] - serving, 0)
            cut = min(rs["spec"]["replicas"], idle + min(spare, serving))
            spare -= max(cut - idle, 0)
            if cut:
                steps.append(_scaled(rs, rs["spec"]["replicas"] - cut))
    return steps


def _available(pod: JsonObject) -> bool:
    return pod_active(pod) and pod_ready(pod)


def _deployment_status(
    deployment: JsonObject, new: JsonObject | None, owned: Sequence[JsonObject], now: datetime
) -> JsonObject:
    def total(name: str, sets: Sequence[JsonObject]) -> int:
        return sum(int(rs.get("status", {}).get(name, 0)) for rs in sets)

    replicas = deployment["spec"]["replicas"]
    updated = [new] if new is not None else []
    counts = {
        "replicas": total("replicas", owned),
        "updatedReplicas": total("replicas", updated),
        "readyReplicas": total("readyReplicas", owned),
        "availableReplicas": total("availableReplicas", owned),
        "unavailableReplicas": max(replicas - total("availableReplicas", owned), 0),
    }
    status = {"conditions": deployment.get("status", {}).get("conditions", [])}
    status.update({name: value for name, value in counts.items() if value})
    status["observedGeneration"] = deployment["metadata"].get("generation", 1)
    draft = {**deployment, "status": status}
    _, least = _limits(deployment)
    enough = counts["availableReplicas"] >= least
    draft["status"] = with_condition(
        draft,
        "Available",
        "True" if enough else "False",
        "MinimumReplicasAvailable" if enough else "MinimumReplicasUnavailable",
        f"Deployment {'has' if enough else 'does not have'} minimum availability.",
        now,
    )
    name = new["metadata"]["name"] if new is not None else deployment["metadata"]["name"]
    done = counts["updatedReplicas"] == replicas == counts["availableReplicas"] == counts["replicas"]
    return with_condition(
        draft,
        "Progressing",
        "True",
        "NewReplicaSetAvailable" if done else "ReplicaSetUpdated",
        f'ReplicaSet "{name}" {"has successfully progressed" if done else "is progressing"}.',
        now,
    )


def plan_replica_set(replica_set: JsonObject, pods: Sequence[JsonObject]) -> list[Step]:
    """One pass for a ReplicaSet: pods to create or delete, and its status."""
    mine = controlled_by(replica_set, pods)
    active = [pod for pod in mine if pod_active(pod)]
    steps: list[Step] = []
    if not doomed(replica_set):
        missing = replica_set["spec"]["replicas"] - len(active)
        metadata = replica_set["metadata"]
        for _ in range(min(missing, BURST_MAX)):
            steps.append(Create(schema.POD, metadata["namespace"], _pod_of(replica_set), replica_set))
        if missing < 0:
            expendable = sorted(active, key=_keep_longer)[: min(-missing, BURST_MAX)]
            steps += [Delete(schema.POD, pod) for pod in expendable]
    ready = sum(pod_ready(pod) for pod in active)
    counts = {
        "replicas": len(active),
        "fullyLabeledReplicas": len(active),
        "readyReplicas": ready,
        "availableReplicas": ready,
    }
    status: JsonObject = {name: value for name, value in counts.items() if value or name == "replicas"}
    status["observedGeneration"] = replica_set["metadata"].get("generation", 1)
    if status != replica_set.get("status"):
        steps.append(Write(schema.REPLICA_SET, {**replica_set, "status": status}, "status"))
    return steps


def _keep_longer(pod: JsonObject) -> tuple[bool, bool, bool, float]:
    """Sort key: what may go first (unassigned, not running, not ready, newest)."""
    status = pod.get("status", {})
    version = float(pod["metadata"]["resourceVersion"])
    return bool(pod["spec"].get("nodeName")), status.get("phase") == "Running", pod_ready(pod), -version


def _pod_of(replica_set: JsonObject) -> JsonObject:
    template = copy.deepcopy(replica_set["spec"]["template"])
    metadata = {key: value for key, value in template.get("metadata", {}).items() if key in ("labels", "annotations")}
    metadata["generateName"] = replica_set["metadata"]["name"][:57] + "-"
    metadata["ownerReferences"] = [owner_reference(replica_set)]
    return {"metadata": metadata, "spec": template["spec"]}
