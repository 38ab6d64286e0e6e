"""Which node a pod goes to: the nodes that fit, fewest pods of the same owner first, then fewest pods."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ambient.lab.apiserver import schema
from ambient.lab.apiserver.status import JsonObject
from ambient.lab.controllers.steps import Bind, Note, Step, Write, condition, doomed, with_condition

_SCHEDULER = "default-scheduler"


@dataclass(frozen=True, slots=True)
class Unschedulable:
    why: str


def choose_node(pod: JsonObject, nodes: Sequence[JsonObject], pods: Sequence[JsonObject]) -> str | Unschedulable:
    """The name of a node for ``pod``. ``pods`` are all pods, for spreading."""
    reasons: Counter[str] = Counter()
    fitting = []
    for node in nodes:
        why = _unfit(pod, node)
        if why:
            reasons[why] += 1
        else:
            fitting.append(node["metadata"]["name"])
    if not fitting:
        detail = ", ".join(f"{count} node(s) {why}" for why, count in sorted(reasons.items()))
        return Unschedulable(f"0/{len(nodes)} nodes are available: {detail or 'no nodes'}.")
    owners = _owners(pod)
    total: Counter[str] = Counter()
    same: Counter[str] = Counter()
    for other in pods:
        name = other["spec"].get("nodeName")
        if name and not doomed(other):
            total[name] += 1
            same[name] += bool(owners and owners & _owners(other))
    return str(min(fitting, key=lambda name: (same[name], total[name], name)))


def _owners(pod: JsonObject) -> frozenset[str]:
    return frozenset(ref["uid"] for ref in pod["metadata"].get("ownerReferences", ()))


def _unfit(pod: JsonObject, node: JsonObject) -> str:
    """Why ``node`` cannot take ``pod``, in the real scheduler's words; empty when it can."""
    spec = node.get("spec", {})
    labels = node["metadata"].get("labels", {})
    ready = condition(node, "Ready")
    if doomed(node):
        return "were being deleted"
    if ready is None or ready["status"] != "True":
        return "were not ready"
    if spec.get("unschedulable") and not _tolerated(
        pod, {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}
    ):
        return "were unschedulable"
    for taint in spec.get("taints", ()):
        if taint.get("effect") in ("NoSchedule", "NoExecute") and not _tolerated(pod, taint):
            return f"had untolerated taint {{{taint.get('key')}: {taint.get('value', '')}}}"
    if not pod["spec"].get("nodeSelector", {}).items() <= labels.items():
        return "didn't match Pod's node affinity/selector"
    affinity = pod["spec"].get("affinity", {})
    hard = "requiredDuringSchedulingIgnoredDuringExecution"
    for name in ("podAffinity", "podAntiAffinity"):
        if isinstance(affinity.get(name), dict) and affinity[name].get(hard):
            return f"were refused because {name} is not supported here (use nodeSelector)"
    required = affinity["nodeAffinity"].get(hard) if isinstance(affinity.get("nodeAffinity"), dict) else None
    if required and not _affine(required, node):
        return "didn't match Pod's node affinity/selector"
    return ""


def _affine(required: Any, node: JsonObject) -> bool:
    terms = required.get("nodeSelectorTerms") if isinstance(required, dict) else None
    if not isinstance(terms, list):
        return False
    labels = node["metadata"].get("labels", {})
    fields = {"metadata.name": node["metadata"]["name"]}
    return any(
        isinstance(term, dict)
        and (term.get("matchExpressions") or term.get("matchFields"))
        and all(_holds(item, labels) for item in term.get("matchExpressions") or ())
        and all(_holds(item, fields) for item in term.get("matchFields") or ())
        for term in terms
    )


def _holds(expression: Any, labels: JsonObject) -> bool:
    """Whether an expression holds; one that is not understood never does."""
    if not isinstance(expression, dict):
        return False
    value = labels.get(expression.get("key", ""))
    values = expression.get("values") or []
    match expression.get("operator"):
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
    return False


def _tolerated(pod: JsonObject, taint: JsonObject) -> bool:
    for toleration in pod["spec"].get("tolerations", ()):
        if toleration.get("effect") not in (None, "", taint.get("effect")):
            continue
        key = toleration.get("key", "")
        if toleration.get("operator", "Equal") == "Exists":
            if key in ("", taint.get("key")):
                return True
        elif key == taint.get("key") and toleration.get("value", "") == taint.get("value", ""):
            return True
    return False


def plan_scheduling(pods: Sequence[JsonObject], nodes: Sequence[JsonObject], now: datetime) -> list[Step]:
    """Bind every pod that waits for a node; say on its status why when none fits."""
    steps: list[Step] = []
    known = list(pods)
    for pod in pods:
        spec = pod["spec"]
        if spec.get("nodeName") or doomed(pod) or spec.get("schedulerName", _SCHEDULER) != _SCHEDULER:
            continue
        chosen = choose_node(pod, nodes, known)
        if isinstance(chosen, Unschedulable):
            status = with_condition(pod, "PodScheduled", "False", "Unschedulable", chosen.why, now)
            if status != pod["status"]:
                steps.append(Write(schema.POD, {**pod, "status": status}, "status"))
                steps.append(Note(pod, "FailedScheduling", chosen.why, _SCHEDULER, warning=True))
            continue
        known.append({**pod, "spec": {**spec, "nodeName": chosen}})
        metadata = pod["metadata"]
        message = f"Successfully assigned {metadata['namespace']}/{metadata['name']} to {chosen}"
        steps += [Bind(pod, chosen), Note(pod, "Scheduled", message, _SCHEDULER)]
    return steps
