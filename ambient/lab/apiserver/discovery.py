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


def openapi_v2() -> JsonObject:
    return {"swagger": "2.0", "info": {"title": "Kubernetes", "version": VERSION["gitVersion"]}, "paths": {}}


def openapi_v2_protobuf() -> bytes:
    """The same document as ``openapi.v2.Document`` (gnostic): swagger = 1, info = 2 {title = 1, version = 2}."""

    def text(number: int, value: bytes) -> bytes:
        return bytes((number << 3 | 2, len(value))) + value

    info = text(1, b"Kubernetes") + text(2, str(VERSION["gitVersion"]).encode())
    return text(1, b"2.0") + text(2, info)


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
            {"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": True}}
            for name in ("dryRun", "fieldManager", "fieldValidation")
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
