"""The control plane's own HTTP: readiness, metrics, and what it holds, for operators on this machine or pod."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from ambient.control.dump import plain
from ambient.control.reconcile import Reconciler
from ambient.errors import ConfigFault
from ambient.io.control_writer import Writer
from ambient.io.reflector import Reflector
from ambient.model.address import SocketAddress
from ambient.model.world import World
from ambient.xds.server import Server


class Plane(Protocol):
    """What is shown. Everything is read at the moment of the request."""

    reconciler: Reconciler
    discovery: Server
    writer: Writer
    reflectors: tuple[Reflector, ...]  # type: ignore[type-arg]
    publishes_total: int

    @property
    def leading(self) -> bool: ...

    def not_ready(self) -> tuple[str, ...]:
        """What readiness waits for; empty: ready."""


class _Collector:
    def __init__(self, plane: Plane) -> None:
        self._plane = plane

    def collect(self) -> Iterator[Metric]:
        plane = self._plane
        world = plane.reconciler.world or World()
        known = GaugeMetricFamily("ambient_control_world", "Objects served", labels=["type"])
        known.add_metric(["workloads"], len(world.workloads))
        known.add_metric(["services"], len(world.services))
        known.add_metric(["policies"], len(world.policies))
        yield known
        problems = [p for p in plane.reconciler.problems if not p.notice]
        yield GaugeMetricFamily("ambient_control_problems", "Objects' fields that are wrong now", len(problems))
        delay = plane.reconciler.delay
        yield GaugeMetricFamily(
            "ambient_control_strict_waiting", "Workloads not yet strict: peers still learn of HBONE", len(delay.waiting)
        )
        yield CounterMetricFamily(
            "ambient_control_strict_timeouts", "Workloads made strict unacknowledged", delay.timeouts_total
        )
        yield CounterMetricFamily("ambient_control_publishes", "Worlds published", plane.publishes_total)
        yield GaugeMetricFamily(
            "ambient_control_subscribers", "Connected discovery clients", len(plane.discovery.connected())
        )
        yield CounterMetricFamily(
            "ambient_control_nacks", "Responses refused by clients that left", plane.discovery.nacks_total
        )
        yield GaugeMetricFamily("ambient_control_leading", "1 if this replica serves and writes", int(plane.leading))
        cached = GaugeMetricFamily("ambient_control_objects", "Objects read from the API", labels=["kind"])
        relists = CounterMetricFamily("ambient_control_relists", "Complete lists of the API", labels=["kind"])
        failing = GaugeMetricFamily("ambient_control_api_failures", "Failed tries in a row", labels=["kind"])
        for reflector in plane.reflectors:
            cached.add_metric([reflector.kind.name], len(reflector.objects))
            relists.add_metric([reflector.kind.name], reflector.relists)
            failing.add_metric([reflector.kind.name], reflector.failures)
        yield from (cached, relists, failing)
        writes = CounterMetricFamily("ambient_control_writes", "Writes to the API", labels=["what", "result"])
        for (what, result), count in sorted(plane.writer.writes.items()):
            writes.add_metric([what, result], count)
        yield writes


def make_app(plane: Plane) -> web.Application:
    registry = CollectorRegistry()
    registry.register(_Collector(plane))

    async def ready(_: web.Request) -> web.Response:
        missing = plane.not_ready()
        if missing:
            return web.Response(status=503, text=f"not ready: {', '.join(missing)}\n")
        return web.Response(text="ready\n")

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), content_type="text/plain", charset="utf-8")

    async def world(_: web.Request) -> web.Response:
        held = plane.reconciler.world
        return _json(plain(held) if held is not None else None)

    async def subscribers(_: web.Request) -> web.Response:
        return _json([plain(client) for client in plane.discovery.connected()])

    async def problems(_: web.Request) -> web.Response:
        return _json(
            {
                "objects": [plain(p) for p in plane.reconciler.problems],
                "api": _failing(plane.reflectors),
                "strictWaiting": list(plane.reconciler.delay.waiting),
                "encoding": dict(plane.discovery.store.faults),
            }
        )

    app = web.Application()
    for path, handler in (
        ("/ready", ready),
        ("/healthz/ready", ready),
        ("/metrics", metrics),
        ("/debug/world", world),
        ("/debug/subscribers", subscribers),
        ("/debug/problems", problems),
    ):
        app.router.add_get(path, handler)
    return app


def _failing(reflectors: Iterable[Reflector]) -> dict[str, str]:  # type: ignore[type-arg]
    return {r.kind.name: r.last_error for r in reflectors if r.last_error}


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


async def listen(app: web.Application, address: str, say: Callable[[str], None]) -> web.AppRunner:
    """Serve until the runner is cleaned up. Raises ConfigFault if ``address`` is not ADDRESS:PORT."""
    try:
        where = SocketAddress.parse(address)
    except ValueError as error:
        raise ConfigFault("admin_listen", address, str(error)) from None
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, str(where.ip), where.port)
        await site.start()
    except OSError as error:
        await runner.cleanup()
        raise ConfigFault("admin_listen", address, str(error)) from None
    say(f"admin endpoint on {where}")
    return runner
