"""Label and field selectors: parsed once per request, matched against every object of a list or watch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ambient.lab.apiserver.names import label_value, qualified_name
from ambient.lab.apiserver.schema import Kind
from ambient.lab.apiserver.status import JsonObject, bad_request

Matcher = Callable[[JsonObject], bool]

_SELECTOR_BYTES_MAX = 16_384
_SET = re.compile(r"\s*(\S+?)\s+(in|notin)\s*\(([^()]*)\)\s*")
_COMPARE = re.compile(r"\s*([^\s!=<>]+)\s*(==|=|!=|>|<)\s*([^\s!=<>]*)\s*")
_EXISTS = re.compile(r"\s*(!?)\s*([^\s!=<>]+)\s*")

_FIELDS: dict[str, dict[str, str]] = {
    "pods": {
        "spec.nodeName": "",
        "spec.restartPolicy": "",
        "spec.schedulerName": "",
        "spec.serviceAccountName": "",
        "spec.hostNetwork": "false",
        "status.phase": "",
        "status.podIP": "",
        "status.nominatedNodeName": "",
    },
    "nodes": {"spec.unschedulable": "false"},
    "namespaces": {"status.phase": ""},
    "secrets": {"type": ""},
    "services": {"spec.clusterIP": "", "spec.type": ""},
    "replicasets.apps": {"status.replicas": "0"},
    "events": {
        "involvedObject.kind": "",
        "involvedObject.namespace": "",
        "involvedObject.name": "",
        "involvedObject.uid": "",
        "involvedObject.apiVersion": "",
        "involvedObject.resourceVersion": "",
        "involvedObject.fieldPath": "",
        "reason": "",
        "reportingComponent": "",
        "source": "",
        "type": "",
    },
}
"""Selectable fields beside metadata.name and metadata.namespace, with the value of an absent one."""


@dataclass(frozen=True, slots=True)
class Requirement:
    key: str
    operator: str
    """One of ``=``, ``!=``, ``in``, ``notin``, ``exists``, ``!``, ``>``, ``<``."""
    values: frozenset[str] = frozenset()

    def holds(self, labels: dict[str, str]) -> bool:
        value = labels.get(self.key)
        match self.operator:
            case "in" | "=":
                return value is not None and value in self.values
            case "notin" | "!=":
                return value is None or value not in self.values
            case "exists":
                return value is not None
            case "!":
                return value is None
        try:
            number, limit = int(value or ""), int(next(iter(self.values)))
        except ValueError:
            return False
        return number > limit if self.operator == ">" else number < limit


def _split(text: str) -> list[str]:
    """Split at commas outside parentheses."""
    parts, depth, start = [], 0, 0
    for index, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if char == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    parts.append(text[start:])
    return parts


def parse_labels(text: str) -> tuple[Requirement, ...]:
    """Parse a labelSelector query. Raises ApiError 400 naming the part that is wrong."""
    if len(text) > _SELECTOR_BYTES_MAX:
        raise bad_request(f"unable to parse requirement: selector longer than {_SELECTOR_BYTES_MAX} bytes")
    if not text.strip():
        return ()
    requirements = []
    for part in _split(text):
        if found := _SET.fullmatch(part):
            values = frozenset(value.strip() for value in found[3].split(","))
            requirement = Requirement(found[1], found[2], values)
        elif found := _COMPARE.fullmatch(part):
            operator = "=" if found[2] == "==" else found[2]
            requirement = Requirement(found[1], operator, frozenset((found[3],)))
        elif found := _EXISTS.fullmatch(part):
            requirement = Requirement(found[2], "!" if found[1] else "exists")
        else:
            raise bad_request(f"unable to parse requirement: {part!r}: expected KEY, !KEY, KEY=VALUE or KEY in (A,B)")
        rules = qualified_name(requirement.key)
        if requirement.operator not in (">", "<"):
            rules = rules + [rule for value in requirement.values for rule in label_value(value)]
        if rules:
            raise bad_request(f"unable to parse requirement: {part!r}: {rules[0]}")
        requirements.append(requirement)
    return tuple(requirements)


def selector_requirements(selector: JsonObject | None) -> tuple[Requirement, ...]:
    """The requirements of a LabelSelector object (matchLabels, matchExpressions), validated beforehand."""
    selector = selector or {}
    requirements = [
        Requirement(key, "=", frozenset((value,))) for key, value in (selector.get("matchLabels") or {}).items()
    ]
    operators = {"In": "in", "NotIn": "notin", "Exists": "exists", "DoesNotExist": "!"}
    for expression in selector.get("matchExpressions") or ():
        operator = operators[expression["operator"]]
        requirements.append(Requirement(expression["key"], operator, frozenset(expression.get("values") or ())))
    return tuple(requirements)


def selector_text(selector: JsonObject | None) -> str:
    """A LabelSelector object as a query, as the scale subresource shows it."""
    parts = []
    for requirement in selector_requirements(selector):
        values = ",".join(sorted(requirement.values))
        match requirement.operator:
            case "=":
                parts.append(f"{requirement.key}={values}")
            case "exists":
                parts.append(requirement.key)
            case "!":
                parts.append(f"!{requirement.key}")
            case operator:
                parts.append(f"{requirement.key} {operator} ({values})")
    return ",".join(parts)


def matches_labels(requirements: tuple[Requirement, ...], obj: JsonObject) -> bool:
    labels = obj["metadata"].get("labels") or {}
    return all(requirement.holds(labels) for requirement in requirements)


def field(obj: JsonObject, path: str) -> Any:
    """The value at a dotted path, or None."""
    value: Any = obj
    for step in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(step)
    return value


def _text(value: Any, absent: str) -> str:
    if value is None:
        return absent
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def parse_fields(text: str, kind: Kind) -> tuple[tuple[str, bool, str, str], ...]:
    """Parse a fieldSelector query into (path, equal, value, value when absent). Raises ApiError 400."""
    known = {"metadata.name": "", "metadata.namespace": "", **_FIELDS.get(kind.resource, {})}
    parsed = []
    for part in text.split(","):
        if not part.strip():
            continue
        found = re.fullmatch(r"\s*([A-Za-z.]+)\s*(==|=|!=)\s*(.*?)\s*", part)
        if not found:
            raise bad_request(f"invalid selector: {part!r}; can't understand it")
        if found[1] not in known:
            raise bad_request(
                f'Unable to find "{kind.resource}" that match field selector "{text}": field label not '
                f"supported: {found[1]}"
            )
        parsed.append((found[1], found[2] != "!=", found[3], known[found[1]]))
    return tuple(parsed)


def matcher(kind: Kind, label_selector: str, field_selector: str) -> Matcher | None:
    """One predicate for both selectors; None when nothing is selected by."""
    labels = parse_labels(label_selector)
    fields = parse_fields(field_selector, kind)
    if not labels and not fields:
        return None

    def matches(obj: JsonObject) -> bool:
        return matches_labels(labels, obj) and all(
            (_text(field(obj, path), absent) == value) is equal for path, equal, value, absent in fields
        )

    return matches
