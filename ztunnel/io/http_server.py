"""The admin endpoint's HTTP server: one request per connection, limits on its bytes, its time and their number.

aiohttp's has no limit on connections, and would cost the control process 10 MB. Where they are too many, the
one that has waited longest on its client makes room, so that who opens connections and says nothing, or reads
nothing, keeps nobody out.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Final

from ztunnel.core.http1 import Answer, Exchange, Request, text

CONNECTIONS_MAX: Final = 64
"""Of one server."""
HEAD_S: Final = 10.0
"""For a client to say its request."""
READ_S: Final = 30.0
"""For a client to take its answer."""
STOP_S: Final = 0.5
_READ_BYTES: Final = 4096
_log = logging.getLogger("ztunnel.admin")

Handler = Callable[[Request], Awaitable[Answer]]
Routes = Mapping[str, Mapping[str, Handler]]
"""Path -> method -> who answers; HEAD is answered as GET."""


class HttpServer:
    """Construct, `listen` any number of times, `close`."""

    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: dict[asyncio.StreamWriter, None] = {}
        """Connections that wait on their client, the longest first."""

    async def listen_unix(self, path: Path) -> None:
        self._servers.append(await asyncio.start_unix_server(self._connected, path))

    async def listen(self, host: str | None, port: int) -> None:
        """On every address if ``host`` is None. Raises OSError, as when the port is in use."""
        try:
            server = await asyncio.start_server(self._connected, host, port)
        except OSError as error:
            if host is not None or error.errno != errno.EADDRNOTAVAIL:
                raise
            # IPv6 is switched off here
            server = await asyncio.start_server(self._connected, "0.0.0.0", port)
        self._servers.append(server)

    async def close(self) -> None:
        """Stop listening; what is being answered has `STOP_S` to end."""
        for server in self._servers:
            server.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- one connection

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._tasks) >= CONNECTIONS_MAX:
            if not self._waiting:
                writer.transport.abort()
                return
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            oldest.transport.abort()
        self._waiting[writer] = None
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            exchange = Exchange()
            request = await self._read(reader, exchange)
            self._waiting.pop(writer, None)
            if request is None:
                return
            answer = await self._answer(request) if isinstance(request, Request) else request
            date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
            writer.write(exchange.answer(answer, date))
            self._waiting[writer] = None
            writer.close()
            async with asyncio.timeout(READ_S):
                await writer.wait_closed()
        except (OSError, TimeoutError):
            pass  # the client is gone, or too slow
        finally:
            self._waiting.pop(writer, None)
            writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader, exchange: Exchange) -> Request | Answer | None:
        """The request, or its refusal; None if the client said none."""
        try:
            async with asyncio.timeout(HEAD_S):
                while data := await reader.read(_READ_BYTES):
                    if (request := exchange.receive(data)) is not None:
                        return request
        except TimeoutError:
            return text(f"the request did not arrive within {HEAD_S:g} s\n", HTTPStatus.REQUEST_TIMEOUT)
        return None

    async def _answer(self, request: Request) -> Answer:
        methods = self._routes.get(request.path)
        if methods is None:
            return text("nothing is here\n", HTTPStatus.NOT_FOUND)
        handler = methods.get("GET" if request.method == "HEAD" else request.method)
        if handler is None:
            allow = tuple(sorted({*methods, *(("HEAD",) if "GET" in methods else ())}))
            return Answer(b"not this method\n", HTTPStatus.METHOD_NOT_ALLOWED, allow=allow)
        try:
            return await handler(request)
        except Exception:  # a bug in one view is no reason to end the process, which serves connections
            _log.exception("%s %s failed", request.method, request.path)
            return text("it failed; the log says why\n", HTTPStatus.INTERNAL_SERVER_ERROR)
