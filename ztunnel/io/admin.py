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
import socket
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Protocol

from aiohttp import web

from ambient.settings import NodeSettings
from ztunnel.core.dump import Json

BODY_BYTES_MAX: Final = 64 * 1024
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


Handler = Callable[[web.Request], Awaitable[web.Response]]


class Admin:
    """Construct, `start`, `stop`."""

    def __init__(self, settings: NodeSettings, views: Views) -> None:
        self._settings = settings
        self._views = views
        self._path = Path(settings.run_dir) / "ztunnel.sock"
        self._runners: list[web.AppRunner] = []
        self._retries: list[asyncio.Task[None]] = []
        self._inode = 0

    async def start(self) -> None:
        admin = self._app(
            {
                "/": self._index,
                "/ready": self._ready,
                "/healthz/ready": self._ready,
                "/config_dump": self._config_dump,
                "/connections": self._connections,
                "/why": self._why,
                "/certificates": self._certificates,
                "/metrics": self._metrics,
                "/stats/prometheus": self._metrics,
                "/logging": self._logging,
            }
        )
        runner = await self._runner(admin)
        self._unlink_stale()
        mask = os.umask(0o177)
        try:
            await web.UnixSite(runner, str(self._path)).start()
        finally:
            os.umask(mask)
        self._inode = self._path.stat().st_ino
        await self._listen(runner, "127.0.0.1", self._settings.admin_port, "admin")
        metrics = await self._runner(self._app({"/metrics": self._metrics, "/stats/prometheus": self._metrics}))
        await self._listen(metrics, None, self._settings.metrics_port, "metrics")
        ready = await self._runner(self._app({"/healthz/ready": self._ready}))
        await self._listen(ready, None, self._settings.readiness_port, "readiness")

    async def stop(self) -> None:
        for task in self._retries:
            task.cancel()
        for runner in self._runners:
            await runner.cleanup()
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

    def _app(self, routes: dict[str, Handler]) -> web.Application:
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        for path, handler in routes.items():
            app.router.add_get(path, handler)
        if "/logging" in routes:
            app.router.add_post("/logging", routes["/logging"])
        return app

    async def _runner(self, app: web.Application) -> web.AppRunner:
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.5)
        await runner.setup()
        self._runners.append(runner)
        return runner

    async def _listen(self, runner: web.AppRunner, host: str | None, port: int, what: str) -> None:
        if port == 0:
            return
        try:
            await web.TCPSite(runner, host, port, reuse_port=False).start()
        except OSError as error:
            if host is None and error.errno == errno.EADDRNOTAVAIL:  # IPv6 is switched off here
                await self._listen(runner, "0.0.0.0", port, what)
                return
            _log.warning("%s port %d: %s; going on without it", what, port, error.strerror or error)
            if error.errno == errno.EADDRINUSE:
                self._retries.append(asyncio.get_running_loop().create_task(self._take_over(runner, host, port, what)))

    async def _take_over(self, runner: web.AppRunner, host: str | None, port: int, what: str) -> None:
        """During an upgrade the port is that of the ztunnel that drains: it is ours when that has ended."""
        while True:
            await asyncio.sleep(TAKE_OVER_S)
            try:
                with socket.socket() as probe:  # a site that cannot start stays registered: try only what will do
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind((host or "0.0.0.0", port))
                await web.TCPSite(runner, host, port, reuse_port=False).start()
            except OSError:
                continue
            _log.info("%s port %d: taken over", what, port)
            return

    async def _index(self, request: web.Request) -> web.Response:
        lines = ("/config_dump", "/connections", "/why", "/certificates", "/logging", "/metrics", "/ready")
        return web.Response(text="\n".join(lines) + "\n")

    async def _ready(self, request: web.Request) -> web.Response:
        pending = self._views.pending()
        if pending:
            return web.Response(status=500, text=f"not ready, pending: {', '.join(pending)}\n")
        return web.Response(text="ready\n")

    async def _config_dump(self, request: web.Request) -> web.Response:
        return _json(self._views.config_dump())

    async def _why(self, request: web.Request) -> web.Response:
        try:
            return _json(self._views.explain(dict(request.query)))
        except ValueError as error:
            return web.Response(status=400, text=f"{error}\n")

    async def _certificates(self, request: web.Request) -> web.Response:
        return _json(self._views.certificates())

    async def _connections(self, request: web.Request) -> web.Response:
        try:
            return _json(await self._views.connections())
        except TimeoutError:
            return web.Response(status=504, text="a worker did not answer\n")

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self._views.metrics(), headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def _logging(self, request: web.Request) -> web.Response:
        level = request.query.get("level")
        if level is None:
            return web.Response(text=f"current log level is {self._views.level()}\n")
        if request.method != "POST":
            return web.Response(status=405, text="POST /logging?level=LEVEL\n")
        try:
            self._views.set_level(level)
        except ValueError as error:
            return web.Response(status=400, text=f"{error}\n")
        return web.Response(text=f"current log level is {self._views.level()}\n")


def _json(value: Json) -> web.Response:
    return web.Response(text=json.dumps(value, indent=2) + "\n", content_type="application/json")
