"""The agent's two sockets: cni.sock for the plugin's stub, agent.sock for whoever wants to know."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from aiohttp import web

from ambient.errors import AmbientError
from ambient.node import cni

READ_S: Final = 10.0
REQUESTS_MAX: Final = 64
"""CNI requests at once; more wait in the socket's backlog."""

log = logging.getLogger(__name__)


async def serve_cni(path: Path, decide: Callable[[cni.Request], Awaitable[cni.Answer]]) -> asyncio.Server:
    """Answer each connection's one request. ``decide`` must not raise."""
    room = asyncio.Semaphore(REQUESTS_MAX)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            try:
                async with room:
                    answer = await _answer(reader, decide)
                    writer.write(answer.encode())
                    await writer.drain()
            finally:
                writer.close()
                await writer.wait_closed()

    server: asyncio.Server = await _listen(path, lambda p: asyncio.start_unix_server(serve, p))
    return server


async def _answer(reader: asyncio.StreamReader, decide: Callable[[cni.Request], Awaitable[cni.Answer]]) -> cni.Answer:
    parts: list[bytes] = []
    try:
        async with asyncio.timeout(READ_S):
            while part := await reader.read(65536):
                parts.append(part)
                if sum(map(len, parts)) > cni.REQUEST_BYTES_MAX:
                    return cni.error("1.1.0", cni.UNDECODABLE, f"the request exceeds {cni.REQUEST_BYTES_MAX} bytes")
    except TimeoutError:
        return cni.error("1.1.0", cni.UNDECODABLE, f"the request did not arrive within {READ_S:g} s")
    request = cni.read_request(b"".join(parts))
    return await decide(request) if isinstance(request, cni.Request) else request


Operation = Callable[[dict[str, str]], Awaitable[Any]]
"""A request's query -> the answer, JSON. An AmbientError becomes a 503, a ValueError a 400, with their words."""


async def serve_status(
    path: Path,
    status: Callable[[], dict[str, Any]],
    ready: Callable[[], str],
    operations: Mapping[tuple[str, str], Operation] = {},
) -> web.AppRunner:
    """GET /status (JSON) and /ready (200, or 503 with the reason that ``ready`` gives), and ``operations`` by
    method and path."""

    def answering(operation: Operation) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def answer(request: web.Request) -> web.StreamResponse:
            try:
                found = await operation(dict(request.query))
            except ValueError as error:
                return web.Response(text=f"{error}\n", status=400)
            except (AmbientError, OSError) as error:
                return web.Response(text=f"{error}\n", status=503)
            return web.Response(body=msgspec.json.encode(found), content_type="application/json")

        return answer

    async def get_status(_: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(status()), content_type="application/json")

    async def get_ready(_: web.Request) -> web.Response:
        reason = ready()
        return web.Response(text=(reason or "ready") + "\n", status=503 if reason else 200)

    app = web.Application()
    app.add_routes([web.get("/status", get_status), web.get("/ready", get_ready)])
    app.add_routes([web.route(method, where, answering(run)) for (method, where), run in operations.items()])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()

    async def start(aside: str) -> web.UnixSite:
        site = web.UnixSite(runner, aside)
        await site.start()
        return site

    await _listen(path, start)
    return runner


async def _listen(path: Path, start: Callable[[str], Awaitable[Any]]) -> Any:
    """Bind aside and rename into place: the path always leads to a listener, an old one until then, mode 0600."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    mask = os.umask(0o177)
    try:
        server = await start(str(aside))
    finally:
        os.umask(mask)
    aside.replace(path)
    return server
