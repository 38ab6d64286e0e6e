"""Answers: objects in the version and form that were asked for, and small facts of a request."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec
import yaml
from aiohttp import web

from ambient.lab.apiserver.protobuf import MEDIA_TYPE, is_protobuf
from ambient.lab.apiserver.requests import Answer, Target, decode, flag
from ambient.lab.apiserver.selectors import selector_text
from ambient.lab.apiserver.status import JsonObject, method_not_allowed
from ambient.lab.apiserver.tables import table


async def body_of(request: web.Request) -> tuple[bytes, str]:
    """The body and its media type; some clients name none, then its first bytes tell."""
    body = await request.read()
    if "Content-Type" in request.headers:
        return body, request.content_type
    return body, MEDIA_TYPE if is_protobuf(body) else "application/json"


async def decoded(request: web.Request) -> Any:
    body, media = await body_of(request)
    return decode(body, media) if body else None


def verb_of(request: web.Request, target: Target) -> str:
    method = request.method
    if target.kind.virtual and method != "POST":
        raise method_not_allowed(method)
    match method:
        case "GET" | "HEAD" if not target.name:
            return "watch" if flag(request.query, "watch") else "list"
        case "GET" | "HEAD":
            return "get"
        case "POST":
            return "create"
        case "PUT" if target.name:
            return "update"
        case "PATCH" if target.name:
            return "patch"
        case "DELETE":
            return "delete" if target.name else "deletecollection"
    raise method_not_allowed(method)


def manager_of(request: web.Request) -> str:
    """The field manager of a write that names none: the client's program name, as in Kubernetes."""
    return request.query.get("fieldManager") or request.headers.get("User-Agent", "").partition("/")[0] or "unknown"


def served(obj: JsonObject, target: Target) -> JsonObject:
    """The object in the version of the path (kinds here differ between versions by name only)."""
    wanted = target.kind.api_version(target.version)
    return obj if obj.get("apiVersion") == wanted else {**obj, "apiVersion": wanted}


def partial(obj: JsonObject, answer: Answer) -> JsonObject:
    return {
        "kind": "PartialObjectMetadata",
        "apiVersion": f"meta.k8s.io/{answer.meta_version}",
        "metadata": obj["metadata"],
    }


def scale(obj: JsonObject) -> JsonObject:
    metadata = {
        key: obj["metadata"][key]
        for key in ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
        if key in obj["metadata"]
    }
    status = {
        "replicas": (obj.get("status") or {}).get("replicas", 0),
        "selector": selector_text(obj["spec"].get("selector")),
    }
    spec = {"replicas": obj["spec"].get("replicas", 0)}
    return {"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata, "spec": spec, "status": status}


def success(details: JsonObject | None = None) -> JsonObject:
    status: JsonObject = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
    if details:
        status["details"] = details
    return status


def respond(
    document: JsonObject, code: int = 200, *, encoding: str = "json", headers: Mapping[str, str] | None = None
) -> web.Response:
    if encoding == "yaml":
        text = yaml.safe_dump(document, sort_keys=False).encode()
        return web.Response(body=text, status=code, content_type="application/yaml", headers=headers)
    body = msgspec.json.encode(document)
    return web.Response(body=body, status=code, content_type="application/json", headers=headers)


def shaped(
    query: Mapping[str, str], target: Target, answer: Answer, obj: JsonObject, now: datetime, *, headers: bool = True
) -> JsonObject:
    """The object in the version and form asked for."""
    obj = served(obj, target)
    if answer.shape == "Table":
        include = query.get("includeObject", "Metadata")
        metadata = {"resourceVersion": obj["metadata"].get("resourceVersion", "")}
        return table(
            target.kind,
            [obj],
            now,
            metadata=metadata,
            include_object=include,
            headers=headers,
            version=answer.meta_version,
        )
    if answer.shape == "Metadata":
        return partial(obj, answer)
    return obj


def one(
    request: web.Request, target: Target, answer: Answer, obj: JsonObject, now: datetime, code: int = 200
) -> web.Response:
    """A response with one object."""
    return respond(shaped(request.query, target, answer, obj, now), code, encoding=answer.encoding)
