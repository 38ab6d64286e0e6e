"""A scripted API server that speaks real HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def pod(name: str, version: int, **labels: str) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "shop", "resourceVersion": str(version), "labels": labels},
        "status": {"podIP": "10.0.0.1", "podIPs": None},
    }


def event(kind: str, item: dict[str, Any]) -> bytes:
    return json.dumps({"type": kind, "object": item}).encode() + b"\n"


def bookmark(version: int) -> bytes:
    return event("BOOKMARK", {"kind": "Pod", "metadata": {"resourceVersion": str(version)}})


def status(code: int, reason: str = "") -> dict[str, Any]:
    return {"kind": "Status", "code": code, "reason": reason, "message": "because"}


class Api:
    """Answers lists and watches from a script, in order, and remembers the queries. Watches hang when it is empty."""

    def __init__(self) -> None:
        self.lists: list[Handler] = []
        self.watches: list[Handler] = []
        self.list_queries: list[dict[str, str]] = []
        self.watch_queries: list[dict[str, str]] = []
        self.requests: list[tuple[str, str, dict[str, str], str, bytes]] = []
        self.answers: list[Handler] = []
        self.ended = asyncio.Event()
        self.changed = asyncio.Condition()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        query = dict(request.query)
        if request.method != "GET" or self.answers:
            self.requests.append(
                (request.method, request.path, query, request.headers.get("Content-Type", ""), await request.read())
            )
            return await self.answers.pop(0)(request) if self.answers else web.json_response(pod("a", 1))
        async with self.changed:
            queries, script = (
                (self.watch_queries, self.watches) if "watch" in query else (self.list_queries, self.lists)
            )
            queries.append(query)
            self.changed.notify_all()
        if not script:
            assert "watch" in query, "a list that the test did not expect"
            response = await self.stream(request)
            await self.ended.wait()
            return response
        return await script.pop(0)(request)

    async def stream(self, request: web.Request, *parts: bytes) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for part in parts:
            await response.write(part)
        return response

    def list(self, *items: dict[str, Any], version: int, token: str = "") -> Api:
        async def answer(_: web.Request) -> web.Response:
            return web.json_response(
                {"metadata": {"resourceVersion": str(version), "continue": token}, "items": list(items)}
            )

        self.lists.append(answer)
        return self

    def list_fails(self, code: int, headers: dict[str, str] | None = None) -> Api:
        async def answer(_: web.Request) -> web.Response:
            return web.json_response(status(code), status=code, headers=headers)

        self.lists.append(answer)
        return self

    def watch(self, *parts: bytes, hang: bool = False) -> Api:
        async def answer(request: web.Request) -> web.StreamResponse:
            response = await self.stream(request, *parts)
            if hang:
                await self.ended.wait()
            return response

        self.watches.append(answer)
        return self

    def watch_fails(self, code: int, headers: dict[str, str] | None = None) -> Api:
        async def answer(_: web.Request) -> web.Response:
            return web.json_response(status(code), status=code, headers=headers)

        self.watches.append(answer)
        return self

    def watch_drops(self, *parts: bytes) -> Api:
        async def answer(request: web.Request) -> web.StreamResponse:
            response = await self.stream(request, *parts)
            assert request.transport is not None
            request.transport.abort()
            return response

        self.watches.append(answer)
        return self

    async def watched(self, count: int) -> None:
        """Until so many watches were asked for."""
        async with asyncio.timeout(10), self.changed:
            await self.changed.wait_for(lambda: len(self.watch_queries) >= count)
