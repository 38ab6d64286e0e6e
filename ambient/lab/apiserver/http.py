"""The HTTPS edge: requests in, `Store` calls, answers out. No rule about objects is decided here."""

from __future__ import annotations

import asyncio
import base64
import logging
import random
import secrets
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec
import yaml
from aiohttp import web

from ambient.lab.apiserver import access, discovery, patch, schema
from ambient.lab.apiserver.apply import server_side_apply, track_update
from ambient.lab.apiserver.certs import Authority, server_context
from ambient.lab.apiserver.history import History
from ambient.lab.apiserver.protobuf import MEDIA_TYPE, is_protobuf
from ambient.lab.apiserver.requests import (
    BODY_BYTES_MAX,
    LIMIT_MAX,
    Answer,
    Target,
    decode,
    decode_object,
    delete_options,
    dry_run,
    flag,
    number,
    parse_accept,
    parse_path,
    version_of,
)
from ambient.lab.apiserver.selectors import matcher, selector_text
from ambient.lab.apiserver.status import (
    ApiError,
    JsonObject,
    bad_request,
    conflict,
    method_not_allowed,
    too_large,
    too_many,
    unknown_path,
    unsupported_media_type,
)
from ambient.lab.apiserver.store import Sources, Store, timestamp
from ambient.lab.apiserver.tables import table
from ambient.lab.apiserver.tokens import ISSUER, TokenAuthority, User
from ambient.lab.apiserver.watch import WatchOptions, serve

log = logging.getLogger(__name__)

_SUFFIX_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"  # Kubernetes' own: no vowels, nothing that looks alike
_WATCH_S_DEFAULT = (1800, 3600)


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """What a cluster's API server is told."""

    service_ranges: tuple[str, ...] = ("10.96.0.0/16", "fd00:10:96::/112")
    """One CIDR per address family; the first is the default family of Services."""
    server_names: tuple[str, ...] = ()
    """DNS names and addresses for the server certificate, beside localhost and the sockets' addresses."""
    advertise: tuple[tuple[str, int], ...] = ()
    """Addresses and ports behind the Service default/kubernetes; empty: no such Service."""
    system_namespaces: tuple[str, ...] = ("kube-system", "ambient-system", "istio-system")
    """Their service accounts may do everything (see `access`)."""
    static_tokens: tuple[tuple[str, User], ...] = ()
    """Bearer tokens beside those this server issues."""
    changes_max: int = 4096
    """Events kept per kind for watches."""
    objects_max: int = 50_000
    watches_max: int = 1000
    bookmark_interval_s: float = 60.0
    write_timeout_s: float = 30.0
    """How long one write to a watcher may take before it is dropped."""
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))


class ApiServer:
    """A Kubernetes API server in memory, on listening sockets handed in; ``store`` is its content.

    Construct, `await start()`, `await stop()`. Objects are gone when it is.
    """

    def __init__(self, sockets: Sequence[socket.socket], settings: ApiSettings | None = None) -> None:
        self._settings = settings or ApiSettings()
        self._sockets = list(sockets)
        sources = Sources(
            now=self._settings.now,
            uid=lambda: str(uuid.uuid4()),
            suffix=lambda: "".join(secrets.choice(_SUFFIX_ALPHABET) for _ in range(5)),
            objects_max=self._settings.objects_max,
            service_ranges=self._settings.service_ranges,
        )
        # Milliseconds since 1970: versions of an earlier run are then older than all of this run's.
        history = History(first_version=time.time_ns() // 1_000_000, changes_max=self._settings.changes_max)
        self.store = Store(sources, history)
        self.tokens = TokenAuthority(self.store)
        self._authority = Authority(datetime.now(UTC))
        self._static_tokens = dict(self._settings.static_tokens)
        self._runner: web.AppRunner | None = None
        self._watches: set[asyncio.Task[Any]] = set()
        if self._settings.advertise:
            self._advertise(self._settings.advertise)

    @property
    def ca_pem(self) -> bytes:
        """The certificate that signed the server's and all client certificates."""
        return self._authority.certificate

    async def start(self) -> None:
        """Serve on every socket handed in; ends with `stop`."""
        names = ["localhost", "127.0.0.1", "::1", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
        names += ["kubernetes.default.svc.cluster.local", *self._settings.server_names]
        for sock in self._sockets:
            address = str(sock.getsockname()[0])
            names += [] if address in ("0.0.0.0", "::") else [address.partition("%")[0]]
        service = self.store.find(schema.SERVICE, "default", "kubernetes")
        names += (service or {}).get("spec", {}).get("clusterIPs", [])
        context = server_context(self._authority.server(dict.fromkeys(names), datetime.now(UTC)), self.ca_pem)
        application = web.Application(client_max_size=BODY_BYTES_MAX)
        application.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0, handle_signals=False)
        await self._runner.setup()
        for sock in self._sockets:
            await web.SockSite(self._runner, sock, ssl_context=context).start()

    async def stop(self) -> None:
        for task in tuple(self._watches):
            task.cancel()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def kubeconfig(
        self,
        server_url: str,
        user: str = "kubernetes-admin",
        groups: Sequence[str] = ("system:masters",),
        *,
        name: str = "ambient-lab",
    ) -> str:
        """A kubeconfig with a client certificate of its own. ``server_url`` such as https://127.0.0.1:6443."""
        pair = self._authority.client(user, groups, datetime.now(UTC))

        def encode(data: bytes) -> str:
            return base64.b64encode(data).decode()

        cluster = {"server": server_url, "certificate-authority-data": encode(self.ca_pem)}
        credentials = {
            "client-certificate-data": encode(pair.certificate),
            "client-key-data": encode(pair.key),
        }
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": name, "cluster": cluster}],
            "users": [{"name": user, "user": credentials}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": user}}],
            "current-context": name,
        }
        return yaml.safe_dump(document, sort_keys=False)

    def _advertise(self, endpoints: Sequence[tuple[str, int]]) -> None:
        """The Service default/kubernetes and its EndpointSlices, as every cluster has them."""
        spec = {
            "clusterIP": str(self.store.first_service_address()),
            "ports": [{"name": "https", "port": 443, "targetPort": endpoints[0][1], "protocol": "TCP"}],
        }
        labels = {"component": "apiserver", "provider": "kubernetes"}
        metadata: JsonObject = {"name": "kubernetes", "labels": labels}
        self.store.create(schema.SERVICE, "default", {"metadata": metadata, "spec": spec})
        for family, mark in (("IPv4", "."), ("IPv6", ":")):
            chosen = [(address, port) for address, port in endpoints if (":" in address) == (mark == ":")]
            if not chosen:
                continue
            piece = {
                "metadata": {
                    "name": "kubernetes" if mark == "." else "kubernetes-ipv6",
                    "labels": {"kubernetes.io/service-name": "kubernetes"},
                },
                "addressType": family,
                "endpoints": [{"addresses": [address], "conditions": {"ready": True}} for address, _ in chosen],
                "ports": [{"name": "https", "port": chosen[0][1], "protocol": "TCP"}],
            }
            self.store.create(schema.ENDPOINT_SLICE, "default", piece)

    # --- requests ---------------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self._dispatch(request)
        except ApiError as error:
            headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else None
            return _respond(error.document(), error.code, headers=headers)
        except web.HTTPRequestEntityTooLarge:
            refusal = too_large(f"limit is {BODY_BYTES_MAX} bytes")
            return _respond(refusal.document(), refusal.code)
        except (ConnectionError, TimeoutError, asyncio.CancelledError):
            raise
        except Exception as fault:
            log.exception("%s %s", request.method, request.path)
            bug = ApiError(500, "InternalError", f"Internal error occurred: {type(fault).__name__}: {fault}")
            return _respond(bug.document(), bug.code)

    async def _dispatch(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        if path in discovery.HEALTH_PATHS:
            return web.Response(text="ok")
        if path.rstrip("/") == "/version":
            return _respond(discovery.VERSION)
        certificate = request.transport.get_extra_info("peercert") if request.transport else None
        authorization = request.headers.get("Authorization", "")
        user = access.authenticate(authorization, certificate, self.tokens, self._static_tokens)
        static = self._static(request, path.rstrip("/"))
        if static is not None:
            return static
        target = parse_path(request.rel_url.raw_path, self.store.registry)
        verb = _verb(request, target)
        if not access.allowed(user, verb, target.kind.resource, target.subresource, self._settings.system_namespaces):
            raise access.refused(user, verb, target.kind, target.subresource, target.namespace, target.name)
        answer = parse_accept(request.headers.get("Accept", ""))
        match verb:
            case "get":
                return self._get(request, target, answer)
            case "list":
                return self._list(request, target, answer)
            case "watch":
                return await self._watch(request, target, answer)
            case "create":
                return await self._create(request, target, answer, user)
            case "update":
                return await self._update(request, target, answer)
            case "patch":
                return await self._patch(request, target, answer)
            case "delete":
                return await self._delete(request, target, answer)
            case "deletecollection":
                return await self._delete_collection(request, target, answer)
        raise method_not_allowed(request.method)

    def _static(self, request: web.Request, path: str) -> web.Response | None:
        registry = self.store.registry
        document: JsonObject | None
        parts = path.strip("/").split("/")
        if path == "":
            document = {"paths": ["/api", "/apis", "/healthz", "/livez", "/openapi/v2", "/openapi/v3", "/readyz"]}
        elif path == "/api":
            document = discovery.api_versions()
        elif path == "/apis":
            document = discovery.api_groups(registry)
        elif path == "/openapi/v2":
            if "protobuf" in request.headers.get("Accept", ""):
                # The "@" of the type asked for is no legal media type; old clients parse the answer's strictly.
                media = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"
                return web.Response(body=discovery.openapi_v2_protobuf(), content_type=media)
            document = discovery.openapi_v2()
        elif path == "/openapi/v3":
            document = discovery.openapi_v3_index(registry)
        elif path.startswith("/openapi/v3/"):
            group, version = (parts[3], parts[4]) if len(parts) == 5 else ("", parts[-1])
            document = discovery.openapi_v3(registry, group, version)
        elif path == "/openid/v1/jwks":
            document = self.tokens.key_set()
        elif path == "/.well-known/openid-configuration":
            document = {
                "issuer": ISSUER,
                "jwks_uri": f"{ISSUER}/openid/v1/jwks",
                "response_types_supported": ["id_token"],
                "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": ["ES256"],
            }
        elif len(parts) == 2 and parts[0] == "apis":
            document = discovery.api_group(registry, parts[1])
        elif len(parts) == 2 and parts[0] == "api":
            document = discovery.api_resources(registry, "", parts[1])
        elif len(parts) == 3 and parts[0] == "apis":
            document = discovery.api_resources(registry, parts[1], parts[2])
        else:
            return None
        if document is None:
            raise unknown_path()
        if request.method not in ("GET", "HEAD"):
            raise method_not_allowed(request.method)
        return _respond(document)

    # --- reading ----------------------------------------------------------------------------------------

    def _get(self, request: web.Request, target: Target, answer: Answer) -> web.Response:
        obj = self.store.get(target.kind, target.namespace, target.name)
        if target.subresource == "scale":
            return _respond(_scale(obj), encoding=answer.encoding)
        if target.subresource not in ("", "status"):
            raise method_not_allowed("GET")
        return self._one(request, target, answer, obj)

    def _one(
        self, request: web.Request, target: Target, answer: Answer, obj: JsonObject, code: int = 200
    ) -> web.Response:
        shaped = self._shaped(request.query, target, answer, obj, True)
        return _respond(shaped, code, encoding=answer.encoding)

    def _shaped(
        self, query: Mapping[str, str], target: Target, answer: Answer, obj: JsonObject, headers: bool
    ) -> JsonObject:
        obj = _served(obj, target)
        if answer.shape == "Table":
            include = query.get("includeObject", "Metadata")
            metadata = {"resourceVersion": obj["metadata"].get("resourceVersion", "")}
            return table(
                target.kind,
                [obj],
                self.store.now,
                metadata=metadata,
                include_object=include,
                headers=headers,
                version=answer.meta_version,
            )
        if answer.shape == "Metadata":
            return _partial(obj, answer)
        return obj

    def _list(self, request: web.Request, target: Target, answer: Answer) -> web.Response:
        query, kind = request.query, target.kind
        matches = matcher(kind, query.get("labelSelector", ""), query.get("fieldSelector", ""))
        version = version_of(query) if query.get("resourceVersionMatch") == "Exact" else None
        seen = version_of(query)
        if seen is not None and seen > self.store.history.version:
            cause = {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
            message = f"Too large resource version: {seen}, current: {self.store.history.version}"
            raise ApiError(504, "Timeout", message, details={"causes": [cause]}, retry_after_s=1)
        limit = number(query, "limit", LIMIT_MAX)
        page = self.store.page(
            kind,
            target.namespace,
            matches=matches,
            limit=limit,
            token=query.get("continue", ""),
            version=version,
        )
        metadata: JsonObject = {"resourceVersion": str(page.version)}
        if page.next:
            metadata["continue"] = page.next
        if page.remaining is not None:
            metadata["remainingItemCount"] = page.remaining
        items = [_served(obj, target) for obj in page.items]
        if answer.shape == "Table":
            include = query.get("includeObject", "Metadata")
            document = table(
                kind,
                items,
                self.store.now,
                metadata=metadata,
                include_object=include,
                version=answer.meta_version,
            )
        elif answer.shape == "Metadata":
            document = {
                "kind": "PartialObjectMetadataList",
                "apiVersion": f"meta.k8s.io/{answer.meta_version}",
                "metadata": metadata,
                "items": [_partial(obj, answer) for obj in items],
            }
        else:
            document = {
                "kind": kind.kind + "List",
                "apiVersion": kind.api_version(target.version),
                "metadata": metadata,
                "items": items,
            }
        return _respond(document, encoding=answer.encoding)

    async def _watch(self, request: web.Request, target: Target, answer: Answer) -> web.StreamResponse:
        if len(self._watches) >= self._settings.watches_max:
            raise too_many(f"more than {self._settings.watches_max} watches; close some")
        query = request.query
        initial = flag(query, "sendInitialEvents")
        timeout_s = number(query, "timeoutSeconds", 86_400) or random.uniform(*_WATCH_S_DEFAULT)
        options = WatchOptions(
            namespace=target.namespace,
            matches=matcher(target.kind, query.get("labelSelector", ""), query.get("fieldSelector", "")),
            version=version_of(query),
            bookmarks=flag(query, "allowWatchBookmarks"),
            initial_events=initial,
            timeout_s=timeout_s,
            bookmark_interval_s=self._settings.bookmark_interval_s,
            write_timeout_s=self._settings.write_timeout_s,
        )
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        task = asyncio.current_task()
        assert task is not None
        self._watches.add(task)
        try:
            await response.prepare(request)
            await serve(
                self.store.history,
                target.kind,
                options,
                lambda obj, first: self._shaped(query, target, answer, obj, first),
                response.write,
                target.kind.api_version(target.version),
            )
            await response.write_eof()
        except (ConnectionError, TimeoutError):
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._watches.discard(task)
        return response

    # --- writing ----------------------------------------------------------------------------------------

    async def _create(self, request: web.Request, target: Target, answer: Answer, user: User) -> web.Response:
        body, media = await _body(request)
        if target.subresource:
            return self._create_subresource(target, answer, decode(body, media))
        if target.name:
            raise method_not_allowed("POST")
        obj = decode_object(body, media, target)
        if target.kind.virtual:
            return _respond(self._review(target, obj, user), 201, encoding=answer.encoding)
        created = self.store.create(target.kind, target.namespace, obj, dry_run=dry_run(request.query))
        return self._one(request, target, answer, created, 201)

    def _create_subresource(self, target: Target, answer: Answer, body: Any) -> web.Response:
        if not isinstance(body, dict):
            raise bad_request("the object provided is unrecognized (must be an object)")
        match target.subresource:
            case "token":
                document = self.tokens.request(target.namespace, target.name, body)
                return _respond(document, 201, encoding=answer.encoding)
            case "binding":
                node = body.get("target")
                node = node.get("name") if isinstance(node, dict) else None
                if not isinstance(node, str) or not node:
                    raise bad_request("target.name: Required value")
                self.store.bind(target.namespace, target.name, node)
                return _respond(_success(), 201)
            case "eviction":
                options = delete_options({}, body.get("deleteOptions"))
                self.store.delete(target.kind, target.namespace, target.name, options)
                return _respond(_success(), 201)
        raise method_not_allowed("POST")

    def _review(self, target: Target, review: JsonObject, user: User) -> JsonObject:
        if target.kind is schema.TOKEN_REVIEW:
            spec = review.get("spec")
            if not isinstance(spec, dict) or not isinstance(spec.get("token", ""), str):
                raise bad_request("spec.token: Required value")
            return self.tokens.review_document(review)
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

    async def _update(self, request: web.Request, target: Target, answer: Answer) -> web.Response:
        body, media = await _body(request)
        if target.subresource == "scale":
            document = decode(body, media)
            return self._set_scale(request, target, answer, lambda _: document)
        obj = decode_object(body, media, target)
        if target.subresource == "finalize":
            return _respond(self.store.finalize_namespace(target.name), encoding=answer.encoding)
        if target.subresource not in ("", "status"):
            raise method_not_allowed("PUT")
        live = self.store.get(target.kind, target.namespace, target.name)
        track = track_update(_manager(request), timestamp(self.store.now), target.kind.custom, lambda _: obj)
        obj["metadata"] = {} if obj.get("metadata") is None else obj["metadata"]
        stored = self.store.replace(
            target.kind,
            target.namespace,
            target.name,
            track(live),
            subresource=target.subresource,
            dry_run=dry_run(request.query),
        )
        return self._one(request, target, answer, stored)

    async def _patch(self, request: web.Request, target: Target, answer: Answer) -> web.Response:
        body, media = await _body(request)
        if media == "application/apply-patch+yaml" and not target.subresource.startswith("scale"):
            return self._apply(request, target, answer, decode_object(body, media, target))
        change = track_update(
            _manager(request), timestamp(self.store.now), target.kind.custom, self._patcher(body, media, target)
        )
        if target.subresource == "scale":
            return self._set_scale(request, target, answer, change)
        if target.subresource not in ("", "status"):
            raise method_not_allowed("PATCH")

        def checked(obj: JsonObject) -> JsonObject:
            result = change(_served(obj, target))
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
        return self._one(request, target, answer, stored)

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
                None if obj is None else _served(obj, target),
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
            return self._one(request, target, answer, stored)
        if target.subresource:
            self.store.get(kind, target.namespace, target.name)
        made = applied(None)
        if made["metadata"].setdefault("name", target.name) != target.name:
            raise bad_request(f"metadata.name: must be the name in the path ({target.name})")
        return self._one(request, target, answer, self.store.create(kind, target.namespace, made, dry_run=dry), 201)

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
        wanted = change(_scale(obj))
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
        return _respond(_scale(stored), encoding=answer.encoding)

    async def _delete(self, request: web.Request, target: Target, answer: Answer) -> web.Response:
        if target.subresource:
            raise method_not_allowed("DELETE")
        options = delete_options(request.query, await _decoded(request))
        obj, gone = self.store.delete(target.kind, target.namespace, target.name, options)
        if not gone:
            return self._one(request, target, answer, obj)
        details = {"name": target.name, "kind": target.kind.plural, "uid": obj["metadata"]["uid"]}
        if target.kind.group:
            details["group"] = target.kind.group
        return _respond(_success(details), encoding=answer.encoding)

    async def _delete_collection(self, request: web.Request, target: Target, answer: Answer) -> web.Response:
        query = request.query
        options = delete_options(query, await _decoded(request))
        matches = matcher(target.kind, query.get("labelSelector", ""), query.get("fieldSelector", ""))
        deleted = []
        for obj in self.store.page(target.kind, target.namespace, matches=matches).items:
            metadata = obj["metadata"]
            deleted.append(self.store.delete(target.kind, metadata.get("namespace", ""), metadata["name"], options)[0])
        document = {
            "kind": target.kind.kind + "List",
            "apiVersion": target.kind.api_version(target.version),
            "metadata": {"resourceVersion": str(self.store.history.version)},
            "items": [_served(obj, target) for obj in deleted],
        }
        return _respond(document, encoding=answer.encoding)


async def _body(request: web.Request) -> tuple[bytes, str]:
    """The body and its media type; some clients name none, then its first bytes tell."""
    body = await request.read()
    if "Content-Type" in request.headers:
        return body, request.content_type
    return body, MEDIA_TYPE if is_protobuf(body) else "application/json"


async def _decoded(request: web.Request) -> Any:
    body, media = await _body(request)
    return decode(body, media) if body else None


def _verb(request: web.Request, target: Target) -> str:
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


def _manager(request: web.Request) -> str:
    """The field manager of a write that names none: the client's program name, as in Kubernetes."""
    return request.query.get("fieldManager") or request.headers.get("User-Agent", "").partition("/")[0] or "unknown"


def _served(obj: JsonObject, target: Target) -> JsonObject:
    """The object in the version of the path (kinds here differ between versions by name only)."""
    wanted = target.kind.api_version(target.version)
    return obj if obj.get("apiVersion") == wanted else {**obj, "apiVersion": wanted}


def _partial(obj: JsonObject, answer: Answer) -> JsonObject:
    return {
        "kind": "PartialObjectMetadata",
        "apiVersion": f"meta.k8s.io/{answer.meta_version}",
        "metadata": obj["metadata"],
    }


def _scale(obj: JsonObject) -> JsonObject:
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


def _success(details: JsonObject | None = None) -> JsonObject:
    status: JsonObject = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
    if details:
        status["details"] = details
    return status


def _respond(
    document: JsonObject, code: int = 200, *, encoding: str = "json", headers: Mapping[str, str] | None = None
) -> web.Response:
    if encoding == "yaml":
        text = yaml.safe_dump(document, sort_keys=False).encode()
        return web.Response(body=text, status=code, content_type="application/yaml", headers=headers)
    body = msgspec.json.encode(document)
    return web.Response(body=body, status=code, content_type="application/json", headers=headers)
