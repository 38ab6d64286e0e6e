"""The Kubernetes API over HTTP: get, list, watch, create, update, patch, delete. Caching is ambient.io.reflector's.

Objects arrive as the slim structures of ambient.manifest.objects and leave as plain JSON values, because what
this project writes (a status, an annotation, a ConfigMap) is always a part of an object. An answer that is not
2xx is an `ApiStatus`; a connection that fails is an `ApiUnreachable`.
"""

from __future__ import annotations

import asyncio
import email.utils
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec

from ambient.io.kube_answers import ApiStatus, ApiUnreachable, Listing, Refusal, WatchEvent, decode_event, decode_page
from ambient.io.kube_auth import Credentials, from_kubeconfig, in_cluster
from ambient.manifest.kinds import Kind
from ambient.manifest.objects import Object
from ambient.manifest.problems import Problem

T = TypeVar("T", bound=Object)

FIELD_MANAGER = "ambient"
PAGE_LIMIT = 500
REQUEST_TIMEOUT_S = 60.0
RETRIES_MAX = 4  # of requests that were answered 429 or could not be sent
RETRY_AFTER_MAX_S = 30.0
LINE_BYTES_MAX = 16 * 1024 * 1024  # one watch event; etcd keeps objects below 1.5 MiB
LIST_BYTES_MAX = 256 * 1024 * 1024  # one page

PatchType = Literal["merge", "json", "strategic", "apply"]
_PATCH_TYPES: Mapping[str, str] = {
    "merge": "application/merge-patch+json",
    "json": "application/json-patch+json",
    "strategic": "application/strategic-merge-patch+json",
    "apply": "application/apply-patch+yaml",
}


class KubeClient:
    """One connection pool to one API server. Make it anywhere; it opens at the first request; `close` it."""

    def __init__(self, credentials: Credentials) -> None:
        self.credentials = credentials
        self._session: aiohttp.ClientSession | None = None

    @staticmethod
    def from_settings(kubeconfig: str = "") -> KubeClient:
        """From the path of a kubeconfig, or the in-cluster service account if empty. ConfigFault, PlatformFault."""
        return KubeClient(from_kubeconfig(kubeconfig) if kubeconfig else in_cluster())

    async def __aenter__(self) -> KubeClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def get(self, kind: Kind[T], name: str, namespace: str = "") -> T:
        """One object. ApiStatus with code 404 if there is none."""
        return kind.decode(await self.request("GET", kind.path(namespace, name)))

    async def list(
        self, kind: Kind[T], namespace: str = "", *, field_selector: str = "", label_selector: str = ""
    ) -> Listing[T]:
        """All objects, page by page; ``namespace`` empty means all namespaces."""
        query = {"limit": str(PAGE_LIMIT)} | _selectors(field_selector, label_selector)
        items: list[T] = []
        unreadable: dict[str, Problem] = {}
        while True:
            page, token = decode_page(kind, await self.request("GET", kind.path(namespace), query=query))
            items += page.items
            unreadable |= page.unreadable
            if not token:
                return Listing(tuple(items), page.resource_version, unreadable)
            query["continue"] = token

    async def watch(
        self,
        kind: Kind[T],
        resource_version: str,
        namespace: str = "",
        *,
        field_selector: str = "",
        label_selector: str = "",
        timeout_s: int = 300,
        stall_timeout_s: float = 120.0,
    ) -> AsyncGenerator[WatchEvent[T], None]:
        """Events after ``resource_version`` until the server ends the watch.

        Raises ApiStatus (410 in the stream or at once: list again) or ApiUnreachable (same version again).
        """
        query = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(timeout_s),
        } | _selectors(field_selector, label_selector)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=stall_timeout_s)
        try:
            async with self._send("GET", kind.path(namespace), query=query, timeout=timeout) as response:
                await _raise_for_status(response)
                async for line in _lines(response.content):
                    yield decode_event(kind, line)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiUnreachable(f"watch of {kind.plural}: {type(error).__name__}: {error}") from None

    async def create(self, kind: Kind[T], body: Mapping[str, Any], namespace: str = "") -> T:
        """``body`` may leave out apiVersion and kind. ApiStatus 409 AlreadyExists if it is there."""
        return kind.decode(await self.request("POST", kind.path(namespace), body=_whole(kind, body)))

    async def update(self, kind: Kind[T], body: Mapping[str, Any], name: str, namespace: str = "") -> T:
        """Replace. ApiStatus 409 Conflict if ``metadata.resourceVersion`` is no longer current."""
        return kind.decode(await self.request("PUT", kind.path(namespace, name), body=_whole(kind, body)))

    async def patch(
        self,
        kind: Kind[T],
        name: str,
        body: Any,
        namespace: str = "",
        *,
        how: PatchType = "merge",
        subresource: str = "",
        field_manager: str = FIELD_MANAGER,
        force: bool = True,
    ) -> T:
        """Change a part. ``how="apply"`` is server-side apply (``force`` takes over conflicting fields)."""
        query = {"fieldManager": field_manager}
        if how == "apply":
            query["force"] = "true" if force else "false"
            body = _whole(kind, body)
        path = kind.path(namespace, name, subresource)
        return kind.decode(await self.request("PATCH", path, query=query, body=body, content_type=_PATCH_TYPES[how]))

    async def delete(
        self, kind: Kind[T], name: str, namespace: str = "", *, uid: str = "", grace_period_s: int | None = None
    ) -> None:
        """Delete; with ``uid`` only that very object (ApiStatus 409 otherwise), with ``grace_period_s`` 0 at once."""
        body: dict[str, Any] = {"preconditions": {"uid": uid}} if uid else {}
        if grace_period_s is not None:
            body["gracePeriodSeconds"] = grace_period_s
        await self.request("DELETE", kind.path(namespace, name), body=body or None)

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
    ) -> bytes:
        """Any request. 429 and, for GET, unreachable servers are tried again a few times; a 401 once."""
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S, sock_connect=10.0)
        data = None if body is None else msgspec.json.encode(body)
        for attempt in range(RETRIES_MAX + 1):
            last = attempt == RETRIES_MAX
            try:
                async with self._send(
                    method, path, query=query, timeout=timeout, data=data, content_type=content_type
                ) as response:
                    await _raise_for_status(response)
                    return await _body(response)
            except ApiStatus as status:
                if status.code == 401 and attempt == 0:
                    self.credentials.forget_token()
                    continue
                if status.code != 429 or last:
                    raise
                delay_s = status.retry_after_s if status.retry_after_s is not None else backoff_s(attempt)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                if method != "GET" or last:
                    raise ApiUnreachable(f"{method} {path}: {type(error).__name__}: {error}") from None
                delay_s = backoff_s(attempt)
            await asyncio.sleep(min(delay_s, RETRY_AFTER_MAX_S))
        raise AssertionError("unreachable")  # the last attempt returns or raises

    def _send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        timeout: aiohttp.ClientTimeout,
        data: bytes | None = None,
        content_type: str = "application/json",
    ) -> Any:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=64), headers={"Accept": "application/json"}, auto_decompress=True
            )
        headers = {}
        if authorization := self.credentials.authorization():
            headers["Authorization"] = authorization
        if data is not None:
            headers["Content-Type"] = content_type
        return self._session.request(
            method,
            self.credentials.server + quote(path, safe="/:@"),
            params=dict(query or {}),
            headers=headers,
            data=data,
            timeout=timeout,
            ssl=self.credentials.tls if self.credentials.tls is not None else True,
            server_hostname=self.credentials.server_hostname,
        )


def backoff_s(attempt: int, base_s: float = 0.2, ceiling_s: float = 30.0) -> float:
    """Full jitter around an exponential: attempt 0 gives up to ``base_s``."""
    return min(ceiling_s, base_s * 2.0 ** min(attempt, 16)) * random.uniform(0.5, 1.0)


def _selectors(field_selector: str, label_selector: str) -> dict[str, str]:
    chosen = {"fieldSelector": field_selector, "labelSelector": label_selector}
    return {key: value for key, value in chosen.items() if value}


def _whole(kind: Kind[T], body: Mapping[str, Any]) -> dict[str, Any]:
    return {"apiVersion": kind.api_version, "kind": kind.name} | dict(body)


async def _body(response: aiohttp.ClientResponse) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > LIST_BYTES_MAX:
            raise ApiUnreachable(f"{response.url.path}: the answer exceeds {LIST_BYTES_MAX} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length up to LINE_BYTES_MAX; StreamReader.readline gives up at its buffer size."""
    parts: list[bytes] = []
    size = 0
    async for chunk in content.iter_any():
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            line = b"".join(parts) + piece if parts else piece
            parts, size = [], 0
            if line.strip():
                yield line
        if rest:
            parts.append(rest)
            size += len(rest)
            if size > LINE_BYTES_MAX:
                raise ApiUnreachable(f"a watch event exceeds {LINE_BYTES_MAX} bytes")
    if parts:  # the server ended in the middle of an event: it was not delivered
        raise ApiUnreachable("the watch ended inside an event")


async def _raise_for_status(response: aiohttp.ClientResponse) -> None:
    if 200 <= response.status < 300:
        return
    text = (await response.content.read(65536)).decode("utf-8", "replace")
    try:
        status = msgspec.json.decode(text, type=Refusal)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        status = Refusal(message=text[:300])
    raise ApiStatus(
        response.status,
        status.reason or response.reason or "",
        status.message,
        _retry_after_s(response.headers.get("Retry-After")),
    )


def _retry_after_s(header: str | None) -> float | None:
    """Seconds or an HTTP date (RFC 9110, 10.2.3); None if absent or unreadable."""
    if header is None:
        return None
    if header.isascii() and header.isdigit() and len(header) < 7:
        return float(header)
    try:
        at = email.utils.parsedate_to_datetime(header)
        return max(0.0, at.timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
