"""Requests as values: the parts of a path, the query options and the form the answer should have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import msgspec
import yaml

from ambient.lab.apiserver.protobuf import MEDIA_TYPE, decode_protobuf
from ambient.lab.apiserver.schema import Kind, Registry
from ambient.lab.apiserver.status import (
    ApiError,
    JsonObject,
    bad_request,
    unknown_path,
    unsupported_media_type,
)
from ambient.lab.apiserver.store import DeleteOptions

BODY_BYTES_MAX = 3 * 1024 * 1024
LIMIT_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Target:
    """What a path means. ``name`` is empty for a collection, ``namespace`` for cluster scope or all namespaces."""

    kind: Kind
    version: str
    namespace: str = ""
    name: str = ""
    subresource: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """The form asked for. ``shape`` is ``""`` (the object), ``Table`` or ``Metadata``; ``encoding`` json or yaml."""

    shape: str = ""
    encoding: str = "json"
    meta_version: str = "v1"


def parse_path(path: str, registry: Registry) -> Target:
    """Read ``/api/v1/...`` or ``/apis/GROUP/VERSION/...``. Raises ApiError 404."""
    parts = [unquote(part) for part in path.strip("/").split("/")]
    if len(parts) >= 3 and parts[0] == "api":
        group, version, rest = "", parts[1], parts[2:]
    elif len(parts) >= 4 and parts[0] == "apis":
        group, version, rest = parts[1], parts[2], parts[3:]
    else:
        raise unknown_path()
    namespace = ""
    if rest[0] == "namespaces" and len(rest) >= 3 and not (group == "" and rest[2] in ("status", "finalize")):
        namespace, rest = rest[1], rest[2:]
    kind = registry.find(group, version, rest[0])
    if kind is None or len(rest) > 3 or not all(parts) or (namespace and not kind.namespaced):
        raise unknown_path()
    name = rest[1] if len(rest) > 1 else ""
    subresource = rest[2] if len(rest) > 2 else ""
    if subresource and subresource not in kind.subresources:
        raise unknown_path()
    if name and kind.namespaced and not namespace:
        raise unknown_path()
    return Target(kind, version, namespace, name, subresource)


def parse_accept(header: str) -> Answer:
    """The first form of an Accept header that this server knows. Raises ApiError 406."""
    for item in header.split(",") if header.strip() else ("*/*",):
        media, *parameters = (part.strip() for part in item.split(";"))
        options = dict(part.split("=", 1) for part in parameters if "=" in part)
        if media in ("application/json", "*/*", "application/*"):
            encoding = "json"
        elif media in ("application/yaml", "application/x-yaml"):
            encoding = "yaml"
        else:
            continue
        version = options.get("v", "v1")
        match options.get("as", ""):
            case "":
                return Answer(encoding=encoding)
            case "Table" if options.get("g") == "meta.k8s.io" and version in ("v1", "v1beta1"):
                return Answer("Table", encoding, version)
            case "PartialObjectMetadata" | "PartialObjectMetadataList" if version in ("v1", "v1beta1"):
                return Answer("Metadata", encoding, version)
    message = "only the following media types are accepted: application/json, application/yaml"
    raise ApiError(406, "NotAcceptable", message)


class _Loader(yaml.SafeLoader):
    """YAML as JSON: dates stay text, and no aliases (a small document could otherwise stand for a huge one)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not accepted")
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def decode(body: bytes, content_type: str) -> Any:
    """A request body as JSON values. Raises ApiError 400 or 415."""
    media = content_type.partition(";")[0].strip().lower()
    try:
        if media.endswith("yaml"):
            value = yaml.load(body, Loader=_Loader)
            msgspec.json.encode(value)  # only what JSON can say
            return value
        if media == MEDIA_TYPE:
            return decode_protobuf(body)
        if media in ("", "application/json") or media.endswith("+json"):
            return msgspec.json.decode(body)
    except (msgspec.DecodeError, yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError, RecursionError) as error:
        raise bad_request(f"the object provided is unrecognized: {error}") from None
    raise unsupported_media_type(
        f"the body of the request was in an unknown format ({media}) - accepted media types include: "
        "application/json, application/yaml"
    )


def decode_object(body: bytes, content_type: str, target: Target) -> JsonObject:
    """A body that must be an object of the target's kind and version. Raises ApiError 400."""
    value = decode(body, content_type)
    if not isinstance(value, dict):
        raise bad_request("the object provided is unrecognized (must be an object)")
    kind, version = value.get("kind", target.kind.kind), value.get("apiVersion")
    expected = target.kind.api_version(target.version)
    if version not in (None, expected):
        raise bad_request(
            f"the API version in the data ({version}) does not match the expected API version ({expected})"
        )
    if kind != target.kind.kind:
        raise bad_request(f"the kind in the data ({kind}) does not match the expected kind ({target.kind.kind})")
    return value


def number(query: Mapping[str, str], name: str, largest: int) -> int:
    """A non-negative query number, 0 when absent. Raises ApiError 400."""
    text = query.get(name, "")
    if not text:
        return 0
    if not (text.isascii() and text.isdigit()) or len(text) > 20:
        raise bad_request(f"{name}: {text!r} is not a number")
    return min(int(text), largest)


def flag(query: Mapping[str, str], name: str) -> bool:
    return query.get(name, "") in ("true", "1", "True")


def version_of(query: Mapping[str, str]) -> int | None:
    """resourceVersion of a list or watch; None when unset or 0 (any version will do)."""
    text = query.get("resourceVersion", "")
    if text in ("", "0"):
        return None
    if not (text.isascii() and text.isdigit()) or len(text) > 19:
        raise bad_request(f"invalid resource version {text!r}")
    return int(text)


def dry_run(query: Mapping[str, str]) -> bool:
    value = query.get("dryRun", "")
    if value not in ("", "All"):
        raise bad_request(f"dryRun: {value!r}: supported values: All")
    return value == "All"


def delete_options(query: Mapping[str, str], body: Any) -> DeleteOptions:
    """DeleteOptions of query and body; the body wins. Raises ApiError 400."""
    document = body if isinstance(body, dict) else {}
    grace = document.get("gracePeriodSeconds")
    if grace is None and query.get("gracePeriodSeconds"):
        grace = number(query, "gracePeriodSeconds", 1 << 31)
    if grace is not None and (not isinstance(grace, int) or isinstance(grace, bool) or grace < 0):
        raise bad_request(f"gracePeriodSeconds: {grace!r}: must be a number of seconds, 0 or more")
    preconditions = document.get("preconditions") or {}
    propagation = document.get("propagationPolicy") or query.get("propagationPolicy") or "Background"
    if document.get("orphanDependents") is True or flag(query, "orphanDependents"):
        propagation = "Orphan"
    if propagation not in ("Background", "Foreground", "Orphan"):
        raise bad_request(f"propagationPolicy: {propagation!r}: supported values: Background, Foreground, Orphan")
    if not isinstance(preconditions, dict):
        raise bad_request("preconditions: must be an object")
    dry = dry_run(query) or document.get("dryRun") == ["All"]
    return DeleteOptions(
        grace,
        str(preconditions.get("uid") or ""),
        str(preconditions.get("resourceVersion") or ""),
        propagation,
        dry,
    )
