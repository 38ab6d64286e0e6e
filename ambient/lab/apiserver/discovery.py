"""What clients read before they send anything: version, groups, resources and a minimal OpenAPI.

The OpenAPI documents describe paths but no schemas: kubectl then leaves field validation to the server and
takes merge keys from its own types. Old kubectl asks for the v2 document as protobuf, newer ones for v3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from ambient.lab.apiserver.schema import ALL_VERBS, Kind, Registry
from ambient.lab.apiserver.status import JsonObject

VERSION: JsonObject = {
    "major": "1",
    "minor": "32",
    "gitVersion": "v1.32.0+ambient-lab",
    "gitCommit": "",
    "gitTreeState": "clean",
    "buildDate": "2025-01-01T00:00:00Z",
    "goVersion": "",
    "compiler": "",
    "platform": "linux/amd64",
}
"""What /version says: clients warn when it is far from their own."""

HEALTH_PATHS = ("/healthz", "/livez", "/readyz")

_PATCH_OPTIONS = ("dryRun", "fieldManager", "fieldValidation")
_SCALE_KIND = ("autoscaling", "v1", "Scale")
_SUBRESOURCE_KINDS = {
    "scale": _SCALE_KIND,
    "token": ("authentication.k8s.io", "v1", "TokenRequest"),
    "binding": ("", "v1", "Binding"),
    "eviction": ("policy", "v1", "Eviction"),
}


def api_versions() -> JsonObject:
    return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}


def _group(name: str, versions: Iterable[str]) -> JsonObject:
    served = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    return {"name": name, "versions": served, "preferredVersion": served[0]}


def _versions(registry: Registry) -> dict[str, list[str]]:
    versions: dict[str, list[str]] = {}
    for kind in registry:
        known = versions.setdefault(kind.group, [])
        known += [version for version in kind.versions if version not in known]
    return versions


def api_groups(registry: Registry) -> JsonObject:
    groups = [_group(name, versions) for name, versions in _versions(registry).items() if name]
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


def api_group(registry: Registry, name: str) -> JsonObject | None:
    versions = _versions(registry).get(name) if name else None
    return {"kind": "APIGroup", "apiVersion": "v1", **_group(name, versions)} if versions else None


def api_resources(registry: Registry, group: str, version: str) -> JsonObject | None:
    """The APIResourceList of a group and version, or None when nothing is served there."""
    resources: list[JsonObject] = []
    for kind in registry:
        if kind.group != group or version not in kind.versions:
            continue
        entry: JsonObject = {
            "name": kind.plural,
            "singularName": kind.singular,
            "namespaced": kind.namespaced,
            "kind": kind.kind,
            "verbs": ["create"] if kind.virtual else list(ALL_VERBS),
        }
        if kind.short_names:
            entry["shortNames"] = list(kind.short_names)
        if kind.categories:
            entry["categories"] = list(kind.categories)
        resources.append(entry)
        resources += [_subresource(kind, name) for name in kind.subresources]
    if not resources:
        return None
    group_version = f"{group}/{version}" if group else version
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources}


def _subresource(kind: Kind, name: str) -> JsonObject:
    entry: JsonObject = {
        "name": f"{kind.plural}/{name}",
        "singularName": "",
        "namespaced": kind.namespaced,
        "kind": kind.kind,
        "verbs": ["get", "patch", "update"],
    }
    if name in _SUBRESOURCE_KINDS:
        entry["group"], entry["version"], entry["kind"] = _SUBRESOURCE_KINDS[name]
    if name in ("token", "binding", "eviction"):
        entry["verbs"] = ["create"]
    elif name == "finalize":
        entry["verbs"] = ["update"]
    return entry


def _paths(registry: Registry) -> Iterable[tuple[str, JsonObject]]:
    """The path of one object of each kind and version, with its group, version and kind."""
    for kind in registry:
        scope = "/namespaces/{namespace}" if kind.namespaced else ""
        for version in () if kind.virtual else kind.versions:
            base = f"/apis/{kind.group}/{version}" if kind.group else f"/api/{version}"
            gvk = {"group": kind.group, "version": version, "kind": kind.kind}
            yield f"{base}{scope}/{kind.plural}/{{name}}", gvk


def openapi_v2(registry: Registry) -> JsonObject:
    """Each kind's PATCH and the options it takes: clients look there whether dry runs are possible."""
    parameters = [{"name": name, "in": "query", "type": "string"} for name in _PATCH_OPTIONS]
    paths = {
        path: {"patch": {"parameters": parameters, "responses": {}, "x-kubernetes-group-version-kind": gvk}}
        for path, gvk in _paths(registry)
    }
    info = {"title": "Kubernetes", "version": VERSION["gitVersion"]}
    return {"swagger": "2.0", "info": info, "paths": paths}


def _field(number: int, value: bytes | str) -> bytes:
    """A length-delimited protobuf field."""
    data = value.encode() if isinstance(value, str) else value
    length, size = bytearray(), len(data)
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return bytes((number << 3 | 2,)) + bytes(length) + data


def openapi_v2_protobuf(registry: Registry) -> bytes:
    """The same document as ``openapi.v2.Document`` of gnostic, whose field numbers these are."""

    def query(name: str) -> bytes:  # parameters item -> parameter -> non-body -> query, its name
        return _field(8, _field(1, _field(2, _field(3, _field(2, "query") + _field(4, name) + _field(6, "string")))))

    parameters = b"".join(query(name) for name in _PATCH_OPTIONS)
    paths = b""
    for path, gvk in _paths(registry):
        text = "".join(f"{key}: '{value}'\n" for key, value in gvk.items())
        extension = _field(13, _field(1, "x-kubernetes-group-version-kind") + _field(2, _field(2, text)))
        paths += _field(2, _field(1, path) + _field(2, _field(8, parameters + extension)))
    info = _field(1, "Kubernetes") + _field(2, str(VERSION["gitVersion"]))
    return _field(1, "2.0") + _field(2, info) + _field(8, paths)


def openapi_v3_index(registry: Registry) -> JsonObject:
    paths: JsonObject = {}
    for group, versions in _versions(registry).items():
        for version in versions:
            path = f"apis/{group}/{version}" if group else f"api/{version}"
            digest = hashlib.sha256(repr(openapi_v3(registry, group, version)).encode()).hexdigest()
            paths[path] = {"serverRelativeURL": f"/openapi/v3/{path}?hash={digest[:32].upper()}"}
    return {"paths": paths}


def openapi_v3(registry: Registry, group: str, version: str) -> JsonObject | None:
    """Each kind's PATCH, and that it takes ``fieldValidation``: so kubectl asks the server, not a schema."""
    kinds = [kind for kind in registry if kind.group == group and version in kind.versions and not kind.virtual]
    if api_resources(registry, group, version) is None:
        return None
    paths: JsonObject = {}
    for kind in kinds:
        base = f"/apis/{group}/{version}" if group else f"/api/{version}"
        scope = "/namespaces/{namespace}" if kind.namespaced else ""
        gvk = {"group": group, "version": version, "kind": kind.kind}
        parameters = [
            {"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": True}} for name in _PATCH_OPTIONS
        ]
        operation = {"parameters": parameters, "responses": {}, "x-kubernetes-group-version-kind": gvk}
        paths[f"{base}{scope}/{kind.plural}"] = {
            "post": {**operation, "x-kubernetes-action": "post"},
        }
        paths[f"{base}{scope}/{kind.plural}/{{name}}"] = {
            "patch": {**operation, "x-kubernetes-action": "patch"},
        }
    info = {"title": "Kubernetes", "version": VERSION["gitVersion"]}
    return {"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": {}}}
