"""The HTTPS edge: requests in, `Store` calls, answers out. No rule about objects is decided here."""

from __future__ import annotations

import asyncio
import base64
import logging
import secrets
import socket
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime

import yaml
from aiohttp import web

from ambient.lab.apiserver import access, discovery, schema
from ambient.lab.apiserver.answers import respond, verb_of
from ambient.lab.apiserver.certs import Authority, server_context
from ambient.lab.apiserver.history import History
from ambient.lab.apiserver.reads import Reads
from ambient.lab.apiserver.requests import BODY_BYTES_MAX, parse_accept, parse_path
from ambient.lab.apiserver.settings import ApiSettings
from ambient.lab.apiserver.status import ApiError, JsonObject, method_not_allowed, too_large, unknown_path
from ambient.lab.apiserver.store import Sources, Store
from ambient.lab.apiserver.tokens import ISSUER, TokenAuthority
from ambient.lab.apiserver.writes import Writes

__all__ = ["ApiServer", "ApiSettings"]

log = logging.getLogger(__name__)

_SUFFIX_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"  # Kubernetes' own: no vowels, nothing that looks alike


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
        self._reads = Reads(self.store, self._settings)
        self._writes = Writes(self.store, self.tokens, self._settings)
        if self._settings.advertise:
            self._advertise(self._settings.advertise)

    @property
    def ca_pem(self) -> bytes:
        """The certificate that signed the server's and all client certificates."""
        return self._authority.certificate

    @property
    def watches(self) -> int:
        """Watches open now."""
        return self._reads.watches

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
        # A client that hangs up ends its handler, or its watch would stay until the next write to it.
        self._runner = web.AppRunner(
            application, access_log=None, shutdown_timeout=1.0, handle_signals=False, handler_cancellation=True
        )
        await self._runner.setup()
        for sock in self._sockets:
            await web.SockSite(self._runner, sock, ssl_context=context).start()

    async def stop(self) -> None:
        self._reads.stop()
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
            return respond(error.document(), error.code, headers=headers)
        except web.HTTPRequestEntityTooLarge:
            refusal = too_large(f"limit is {BODY_BYTES_MAX} bytes")
            return respond(refusal.document(), refusal.code)
        except (ConnectionError, TimeoutError, asyncio.CancelledError):
            raise
        except Exception as fault:
            log.exception("%s %s", request.method, request.path)
            bug = ApiError(500, "InternalError", f"Internal error occurred: {type(fault).__name__}: {fault}")
            return respond(bug.document(), bug.code)

    async def _dispatch(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        if path in discovery.HEALTH_PATHS:
            return web.Response(text="ok")
        if path.rstrip("/") == "/version":
            return respond(discovery.VERSION)
        certificate = request.transport.get_extra_info("peercert") if request.transport else None
        authorization = request.headers.get("Authorization", "")
        user = access.authenticate(authorization, certificate, self.tokens, self._static_tokens)
        if name := request.headers.get("Impersonate-User"):
            groups = request.headers.getall("Impersonate-Group", [])
            user = access.impersonate(user, name, groups, self._settings.system_namespaces)
        static = self._static(request, path.rstrip("/"))
        if static is not None:
            return static
        target = parse_path(request.rel_url.raw_path, self.store.registry)
        verb = verb_of(request, target)
        if not access.allowed(user, verb, target.kind.resource, target.subresource, self._settings.system_namespaces):
            raise access.refused(user, verb, target.kind, target.subresource, target.namespace, target.name)
        answer = parse_accept(request.headers.get("Accept", ""))
        match verb:
            case "get":
                return self._reads.get(request, target, answer)
            case "list":
                return self._reads.list(request, target, answer)
            case "watch":
                return await self._reads.watch(request, target, answer)
            case "create":
                return await self._writes.create(request, target, answer, user)
            case "update":
                return await self._writes.update(request, target, answer)
            case "patch":
                return await self._writes.patch(request, target, answer)
            case "delete":
                return await self._writes.delete(request, target, answer)
            case "deletecollection":
                return await self._writes.delete_collection(request, target, answer)
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
                return web.Response(body=discovery.openapi_v2_protobuf(registry), content_type=media)
            document = discovery.openapi_v2(registry)
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
        return respond(document)
