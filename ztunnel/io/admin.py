"""The admin endpoint: HTTP on ``RUN_DIR/ztunnel.sock`` and on localhost, metrics and readiness on their ports.

Two nodes may share a host (in namespaces of their own, or not): a port in use is logged and left out, the unix
socket always serves.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import stat
from http import HTTPStatus
from pathlib import Path
from typing import Final, Protocol

from ambient.settings import NodeSettings
from ztunnel.core.dump import Json
from ztunnel.core.http1 import JSON, Answer, Request, text
from ztunnel.io.http_server import HttpServer

TAKE_OVER_S: Final = 1.0
_log = logging.getLogger("ztunnel.admin")


class Views(Protocol):
    """What the admin endpoint shows; the control process provides it."""

    def pending(self) -> list[str]:
        """What keeps ztunnel from being ready; empty: ready."""

    def config_dump(self) -> Json: ...

    def explain(self, query: dict[str, str]) -> Json:
        """Raises ValueError naming what cannot be understood."""

    def certificates(self) -> Json: ...

    async def connections(self) -> Json: ...

    def metrics(self) -> bytes: ...

    def level(self) -> str: ...

    def set_level(self, level: str) -> None:
        """Raises ValueError naming a level that is none."""


class Admin:
    """Construct, `start`, `stop`."""

    def __init__(self, settings: NodeSettings, views: Views) -> None:
        self._settings = settings
        self._views = views
        self._path = Path(settings.run_dir) / "ztunnel.sock"
        metrics = {path: {"GET": self._metrics} for path in ("/metrics", "/stats/prometheus")}
        ready = {"/healthz/ready": {"GET": self._ready}}
        self._admin = HttpServer(
            {
                "/": {"GET": self._index},
                "/ready": {"GET": self._ready},
                **ready,
                "/config_dump": {"GET": self._config_dump},
                "/connections": {"GET": self._connections},
                "/why": {"GET": self._why},
                "/certificates": {"GET": self._certificates},
                **metrics,
                "/logging": {"GET": self._logging, "POST": self._logging},
            }
        )
        self._metrics_server = HttpServer(metrics)
        self._readiness_server = HttpServer(ready)
        self._retries: list[asyncio.Task[None]] = []
        self._inode = 0

    async def start(self) -> None:
        self._unlink_stale()
        mask = os.umask(0o177)
        try:
            await self._admin.listen_unix(self._path)
        finally:
            os.umask(mask)
        self._inode = self._path.stat().st_ino
        await self._listen(self._admin, "127.0.0.1", self._settings.admin_port, "admin")
        await self._listen(self._metrics_server, None, self._settings.metrics_port, "metrics")
        await self._listen(self._readiness_server, None, self._settings.readiness_port, "readiness")

    async def stop(self) -> None:
        for task in self._retries:
            task.cancel()
        await asyncio.gather(*(s.close() for s in (self._admin, self._metrics_server, self._readiness_server)))
        try:
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()  # not that of a ztunnel that took over meanwhile
        except OSError:
            pass

    def _unlink_stale(self) -> None:
        """An earlier control process, killed, leaves its socket; a newer one takes the name over."""
        try:
            if stat.S_ISSOCK(self._path.lstat().st_mode):
                self._path.unlink()
        except FileNotFoundError:
            pass

    async def _listen(self, server: HttpServer, host: str | None, port: int, what: str) -> None:
        if port == 0:
            return
        try:
            await server.listen(host, port)
        except OSError as error:
            _log.warning("%s port %d: %s; going on without it", what, port, error.strerror or error)
            if error.errno == errno.EADDRINUSE:
                self._retries.append(asyncio.get_running_loop().create_task(self._take_over(server, host, port, what)))

    async def _take_over(self, server: HttpServer, host: str | None, port: int, what: str) -> None:
        """During an upgrade the port is that of the ztunnel that drains: it is ours when that has ended."""
        while True:
            await asyncio.sleep(TAKE_OVER_S)
            try:
                await server.listen(host, port)
            except OSError:
                continue
            _log.info("%s port %d: taken over", what, port)
            return

    async def _index(self, request: Request) -> Answer:
        lines = ("/config_dump", "/connections", "/why", "/certificates", "/logging", "/metrics", "/ready")
        return text("\n".join(lines) + "\n")

    async def _ready(self, request: Request) -> Answer:
        pending = self._views.pending()
        if pending:
            return text(f"not ready, pending: {', '.join(pending)}\n", HTTPStatus.INTERNAL_SERVER_ERROR)
        return text("ready\n")

    async def _config_dump(self, request: Request) -> Answer:
        return _json(self._views.config_dump())

    async def _why(self, request: Request) -> Answer:
        try:
            return _json(self._views.explain(request.query))
        except ValueError as error:
            return text(f"{error}\n", HTTPStatus.BAD_REQUEST)

    async def _certificates(self, request: Request) -> Answer:
        return _json(self._views.certificates())

    async def _connections(self, request: Request) -> Answer:
        try:
            return _json(await self._views.connections())
        except TimeoutError:
            return text("a worker did not answer\n", HTTPStatus.GATEWAY_TIMEOUT)

    async def _metrics(self, request: Request) -> Answer:
        return Answer(self._views.metrics(), content_type="text/plain; version=0.0.4; charset=utf-8")

    async def _logging(self, request: Request) -> Answer:
        level = request.query.get("level")
        if level is None:
            return text(f"current log level is {self._views.level()}\n")
        if request.method != "POST":
            return Answer(b"POST /logging?level=LEVEL\n", HTTPStatus.METHOD_NOT_ALLOWED, allow=("POST",))
        try:
            self._views.set_level(level)
        except ValueError as error:
            return text(f"{error}\n", HTTPStatus.BAD_REQUEST)
        return text(f"current log level is {self._views.level()}\n")


def _json(value: Json) -> Answer:
    return Answer(f"{json.dumps(value, indent=2)}\n".encode(), content_type=JSON)
