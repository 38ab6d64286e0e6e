"""Rules for names, labels and annotations, with Kubernetes' own words (apimachinery/pkg/util/validation)."""

from __future__ import annotations

import re
from typing import Any

from ambient.lab.apiserver.schema import Kind
from ambient.lab.apiserver.status import Cause, JsonObject, invalid_value, required

_LABEL_1123 = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_QUALIFIED = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
_PORT_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")

ANNOTATIONS_BYTES_MAX = 256 * 1024

_LABEL_1123_RULE = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end "
    "with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
)
_SUBDOMAIN_RULE = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start "
    "and end with an alphanumeric character (e.g. 'example.com', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
)
_LABEL_1035_RULE = (
    "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, "
    "and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is "
    "'[a-z]([-a-z0-9]*[a-z0-9])?')"
)
_QUALIFIED_RULE = (
    "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric "
    "character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is "
    "'([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"
)
_VALUE_RULE = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start "
    "and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation "
    "is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
)


def _too_long(limit: int) -> str:
    return f"must be no more than {limit} characters"


def dns_label(text: str) -> list[str]:
    rules = [] if len(text) <= 63 else [_too_long(63)]
    return rules if _LABEL_1123.fullmatch(text) else [*rules, _LABEL_1123_RULE]


def dns_label_1035(text: str) -> list[str]:
    rules = [] if len(text) <= 63 else [_too_long(63)]
    return rules if _LABEL_1035.fullmatch(text) else [*rules, _LABEL_1035_RULE]


def dns_subdomain(text: str) -> list[str]:
    rules = [] if len(text) <= 253 else [_too_long(253)]
    return rules if _SUBDOMAIN.fullmatch(text) else [*rules, _SUBDOMAIN_RULE]


def port_name(text: str) -> list[str]:
    """IANA_SVC_NAME: a named container or target port."""
    if len(text) > 15:
        return ["must be no more than 15 characters"]
    if not _PORT_NAME.fullmatch(text) or "--" in text:
        return ["must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-), not two in a row"]
    return [] if re.search("[a-z]", text) else ["must contain at least one letter (a-z)"]


def qualified_name(text: str) -> list[str]:
    prefix, slash, name = text.rpartition("/")
    if "/" in prefix:
        return [f"a qualified name {_QUALIFIED_RULE} with an optional DNS subdomain prefix and '/'"]
    rules: list[str] = []
    if slash:
        rules += ["prefix part " + rule for rule in (dns_subdomain(prefix) if prefix else ["must be non-empty"])]
    if not name:
        return [*rules, "name part must be non-empty"]
    if len(name) > 63:
        rules.append("name part " + _too_long(63))
    return rules if _QUALIFIED.fullmatch(name) else [*rules, _QUALIFIED_RULE]


def label_value(text: str) -> list[str]:
    rules = [] if len(text) <= 63 else [_too_long(63)]
    return rules if not text or _QUALIFIED.fullmatch(text) else [*rules, _VALUE_RULE]


def check_labels(labels: Any, field: str) -> list[Cause]:
    if not isinstance(labels, dict):
        return [invalid_value(field, labels, "must be a map of strings")]
    causes: list[Cause] = []
    for key, value in labels.items():
        causes += [invalid_value(field, key, rule) for rule in qualified_name(key)]
        if not isinstance(value, str):
            causes.append(invalid_value(f"{field}.{key}", value, "must be a string"))
            continue
        causes += [invalid_value(field, value, rule) for rule in label_value(value)]
    return causes


def check_annotations(annotations: Any, field: str) -> list[Cause]:
    if not isinstance(annotations, dict):
        return [invalid_value(field, annotations, "must be a map of strings")]
    causes: list[Cause] = []
    size = 0
    for key, value in annotations.items():
        causes += [invalid_value(field, key, rule) for rule in qualified_name(key.lower())]
        if not isinstance(value, str):
            causes.append(invalid_value(f"{field}.{key}", value, "must be a string"))
            continue
        size += len(key) + len(value)
    if size > ANNOTATIONS_BYTES_MAX:
        message = f"Too long: must have at most {ANNOTATIONS_BYTES_MAX} bytes"
        causes.append(Cause(field, message, "FieldValueTooLong"))
    return causes


def check_metadata(kind: Kind, obj: JsonObject) -> list[Cause]:
    """Name, labels, annotations, finalizers and owners of an object about to be written."""
    metadata = obj["metadata"]
    name = metadata.get("name")
    if not name:
        return [required("metadata.name", "name or generateName is required")]
    if not isinstance(name, str):
        return [invalid_value("metadata.name", name, "must be a string")]
    rule = {"namespaces": dns_label, "services": dns_label_1035}.get(kind.resource, dns_subdomain)
    causes = [invalid_value("metadata.name", name, text) for text in rule(name)]
    causes += check_labels(metadata.get("labels") or {}, "metadata.labels")
    causes += check_annotations(metadata.get("annotations") or {}, "metadata.annotations")
    finalizers = metadata.get("finalizers") or []
    if not isinstance(finalizers, list) or not all(isinstance(item, str) and item for item in finalizers):
        causes.append(invalid_value("metadata.finalizers", finalizers, "must be a list of names"))
    owners = metadata.get("ownerReferences") or []
    if not isinstance(owners, list):
        return [*causes, invalid_value("metadata.ownerReferences", owners, "must be a list")]
    for index, owner in enumerate(owners):
        where = f"metadata.ownerReferences[{index}]"
        if not isinstance(owner, dict):
            causes.append(invalid_value(where, owner, "must be an object"))
            continue
        causes += [required(f"{where}.{key}") for key in ("apiVersion", "kind", "name", "uid") if not owner.get(key)]
    return causes
