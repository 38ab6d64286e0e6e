"""Writing: create, update, the patch kinds, delete, and the subresources that act."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aiohttp import web

from ambient.lab.apiserver import access, patch, schema
from ambient.lab.apiserver.answers import body_of, decoded, manager_of, one, respond, scale, served, success
from ambient.lab.apiserver.apply import server_side_apply, track_update
from ambient.lab.apiserver.moments import timestamp
from ambient.lab.apiserver.requests import (
    Answer,
    Target,
    decode,
    decode_object,
    delete_options,
    dry_run,
    flag,
)
from ambient.lab.apiserver.selectors import matcher
from ambient.lab.apiserver.settings import ApiSettings
from ambient.lab.apiserver.status import (
    JsonObject,
    bad_request,
    conflict,
    method_not_allowed,
    unsupported_media_type,
)
from ambient.lab.apiserver.store import Store
from ambient.lab.apiserver.tokens import TokenAuthority, User


class Writes:
    """Answers requests that change objects (or ask for a review)."""

    def __init__(self, store: Store, tokens: TokenAuthority, settings: ApiSettings) -> None:
        self.store = store
        self._tokens = tokens
        self._settings = settings

    async def create(self, request: web.Request, target: Target, answer: Answer, user: User) -> web.Response:
        body, media = await body_of(request)
        if target.subresource:
            return self._create_subresource(target, answer, decode(body, media))
        if target.name:
            raise method_not_allowed("POST")
        obj = decode_object(body, media, target)
        if target.kind.virtual:
            return respond(self._review(target, obj, user), 201, encoding=answer.encoding)
        created = self.store.create(target.kind, target.namespace, obj, dry_run=dry_run(request.query))
        return one(request, target, answer, created, self.store.now, 201)

    def _create_subresource(self, target: Target, answer: Answer, body: Any) -> web.Response:
        if not isinstance(body, dict):
            raise bad_request("the object provided is unrecognized (must be an object)")
        match target.subresource:
            case "token":
                document = self._tokens.request(target.namespace, target.name, body)
                return respond(document, 201, encoding=answer.encoding)
            case "binding":
                node = body.get("target")
                node = node.get("name") if isinstance(node, dict) else None
                if not isinstance(node, str) or not node:
                    raise bad_request("target.name: Required value")
                self.store.bind(target.namespace, target.name, node)
                return respond(success(), 201)
            case "eviction":
                options = delete_options({}, body.get("deleteOptions"))
                self.store.delete(target.kind, target.namespace, target.name, options)
                return respond(success(), 201)
        raise method_not_allowed("POST")

    def _review(self, target: Target, review: JsonObject, user: User) -> JsonObject:
        if target.kind is schema.TOKEN_REVIEW:
            spec = review.get("spec")
            if not isinstance(spec, dict) or not isinstance(spec.get("token", ""), str):
                raise bad_request("spec.token: Required value")
            return self._tokens.review_document(review)
        head: JsonObject = {
            "kind": target.kind.kind,
            "apiVersion": target.kind.api_version(),
            "metadata": {"creationTimestamp": timestamp(self.store.now)},
        }
        if target.kind is schema.SELF_REVIEW:
            return {**head, "status": {"userInfo": user.document()}}
        spec = review.get("spec") if isinstance(review.get("spec"), dict) else {}
        asked = spec.get("resourceAttributes") if isinstance(spec, dict) else None
        systems = self._settings.system_namespaces
        if isinstance(asked, dict):
            group, plural = str(asked.get("group", "")), str(asked.get("resource", ""))
            resource = f"{plural}.{group}" if group else plural
            may = access.allowed(user, str(asked.get("verb", "")), resource, str(asked.get("subresource", "")), systems)
        else:
            may = access.is_system(user, systems)
        return {**head, "spec": spec, "status": {"allowed": may}}

    async def update(self, request: web.Request, target: Target, answer: Answer) -> web.Response:
        body, media = await body_of(request)
        if target.subresource == "scale":
            document = decode(body, media)
            return self._set_scale(request, target, answer, lambda _: document)
        obj = decode_object(body, media, target)
        if target.subresource == "finalize":
            return respond(self.store.finalize_namespace(target.name), encoding=answer.encoding)
        if target.subresource not in ("", "status"):
            raise method_not_allowed("PUT")
        live = self.store.get(target.kind, target.namespace, target.name)
        track = track_update(manager_of(request), timestamp(self.store.now), target.kind.custom, lambda _: obj)
        obj["metadata"] = {} if obj.get("metadata") is None else obj["metadata"]
        stored = self.store.replace(
            target.kind,
            target.namespace,
            target.name,
            track(live),
            subresource=target.subresource,
            dry_run=dry_run(request.query),
        )
        return one(request, target, answer, stored, self.store.now)

    async def patch(self, request: web.Request, target: Target, answer: Answer) -> web.Response:
        body, media = await body_of(request)
        if media == "application/apply-patch+yaml" and not target.subresource.startswith("scale"):
            return self._apply(request, target, answer, decode_object(body, media, target))
        change = track_update(
            manager_of(request), timestamp(self.store.now), target.kind.custom, self._patcher(body, media, target)
        )
        if target.subresource == "scale":
            return self._set_scale(request, target, answer, change)
        if target.subresource not in ("", "status"):
            raise method_not_allowed("PATCH")

        def checked(obj: JsonObject) -> JsonObject:
            result = change(served(obj, target))
            if result.get("kind") != target.kind.kind:
                raise bad_request(f"the kind may not be changed by a patch ({result.get('kind')})")
            return result

        stored = self.store.modify(
            target.kind,
            target.namespace,
            target.name,
            checked,
            subresource=target.subresource,
            dry_run=dry_run(request.query),
        )
        return one(request, target, answer, stored, self.store.now)

    def _apply(self, request: web.Request, target: Target, answer: Answer, config: JsonObject) -> web.Response:
        manager = request.query.get("fieldManager", "")
        if not manager:
            raise bad_request("fieldManager is required for apply patch")
        if target.subresource not in ("", "status"):
            raise method_not_allowed("PATCH")
        kind, dry = target.kind, dry_run(request.query)
        if target.subresource == "" and kind.has_status() and kind is not schema.NODE:
            config.pop("status", None)
        live = self.store.find(kind, target.namespace, target.name)

        def applied(obj: JsonObject | None) -> JsonObject:
            return server_side_apply(
                None if obj is None else served(obj, target),
                config,
                manager=manager,
                force=flag(request.query, "force"),
                custom=kind.custom,
                now=timestamp(self.store.now),
            )

        if live is not None:
            stored = self.store.modify(
                kind, target.namespace, target.name, applied, subresource=target.subresource, dry_run=dry
            )
            return one(request, target, answer, stored, self.store.now)
        if target.subresource:
            self.store.get(kind, target.namespace, target.name)
        made = applied(None)
        if made["metadata"].setdefault("name", target.name) != target.name:
            raise bad_request(f"metadata.name: must be the name in the path ({target.name})")
        return one(
            request, target, answer, self.store.create(kind, target.namespace, made, dry_run=dry), self.store.now, 201
        )

    @staticmethod
    def _patcher(body: bytes, media: str, target: Target) -> Callable[[JsonObject], JsonObject]:
        document = decode(body, media)
        match media:
            case "application/json-patch+json":
                return lambda obj: patch.json_patch(obj, document)
            case "application/merge-patch+json" | "application/strategic-merge-patch+json":
                if not isinstance(document, dict):
                    raise bad_request("a patch of this kind must be an object")
                if media == "application/merge-patch+json":
                    return lambda obj: dict(patch.merge(obj, document))
                if not target.kind.custom:
                    return lambda obj: patch.strategic(obj, document)
        known = ["application/json-patch+json", "application/merge-patch+json", "application/apply-patch+yaml"]
        known += [] if target.kind.custom else ["application/strategic-merge-patch+json"]
        raise unsupported_media_type(
            "the body of the request was in an unknown format - accepted media types include: " + ", ".join(known)
        )

    def _set_scale(
        self, request: web.Request, target: Target, answer: Answer, change: Callable[[JsonObject], Any]
    ) -> web.Response:
        obj = self.store.get(target.kind, target.namespace, target.name)
        wanted = change(scale(obj))
        spec = wanted.get("spec") if isinstance(wanted, dict) else None
        replicas = spec.get("replicas", 0) if isinstance(spec, dict) else None
        if not isinstance(replicas, int) or isinstance(replicas, bool) or replicas < 0:
            raise bad_request(f"spec.replicas: Invalid value: {replicas!r}: must be greater than or equal to 0")
        seen = (wanted.get("metadata") or {}).get("resourceVersion")
        if seen and seen != obj["metadata"]["resourceVersion"]:
            raise conflict(target.kind.plural, target.kind.group, target.name)

        def scaled(mine: JsonObject) -> None:
            mine["spec"]["replicas"] = replicas

        stored = self.store.modify(target.kind, target.namespace, target.name, scaled, dry_run=dry_run(request.query))
        return respond(scale(stored), encoding=answer.encoding)

    async def delete(self, request: web.Request, target: Target, answer: Answer) -> web.Response:
        if target.subresource:
            raise method_not_allowed("DELETE")
        options = delete_options(request.query, await decoded(request))
        obj, gone = self.store.delete(target.kind, target.namespace, target.name, options)
        if not gone:
            return one(request, target, answer, obj, self.store.now)
        details = {"name": target.name, "kind": target.kind.plural, "uid": obj["metadata"]["uid"]}
        if target.kind.group:
            details["group"] = target.kind.group
        return respond(success(details), encoding=answer.encoding)

    async def delete_collection(self, request: web.Request, target: Target, answer: Answer) -> web.Response:
        query = request.query
        options = delete_options(query, await decoded(request))
        matches = matcher(target.kind, query.get("labelSelector", ""), query.get("fieldSelector", ""))
        deleted = []
        for obj in self.store.page(target.kind, target.namespace, matches=matches).items:
            metadata = obj["metadata"]
            deleted.append(self.store.delete(target.kind, metadata.get("namespace", ""), metadata["name"], options)[0])
        document = {
            "kind": target.kind.kind + "List",
            "apiVersion": target.kind.api_version(target.version),
            "metadata": {"resourceVersion": str(self.store.history.version)},
            "items": [served(obj, target) for obj in deleted],
        }
        return respond(document, encoding=answer.encoding)
