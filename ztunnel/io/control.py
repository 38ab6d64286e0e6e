"""The control process: the World, keys, metrics, DNS and the admin endpoint; it answers the workers' questions.

Forked last by the parent (`ztunnel.io.run`), so that grpc is only ever imported here. It takes pods and the
workers' streams from the parent. When the parent dies alone it serves on as long as the workers do (`_outlive_parent`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from ambient.errors import AmbientError, OurFault, PeerFault
from ambient.io import ca_client, xds_client
from ambient.io.seqpacket import AsyncPacketSocket, close_all
from ambient.model.world import Diff, World
from ambient.node import messages as node
from ambient.settings import NodeSettings
from ztunnel.core import dump, explain, messages
from ztunnel.core.local import Local
from ztunnel.core.names import Names
from ztunnel.core.state import Decisions, Outgoing
from ztunnel.io import logs, views
from ztunnel.io.admin import Admin
from ztunnel.io.certificates import Certificates, Create
from ztunnel.io.dns import DnsProxy
from ztunnel.io.kernel_flows import KernelFlows
from ztunnel.io.metrics import Metrics, product_version
from ztunnel.io.recorder import Recorder
from ztunnel.io.worker_link import WorkerLink

TICK_S: Final = 0.25
SWEEP_S: Final = 15.0
FLUSH_S: Final = 5.0
"""How long a change may take to reach every worker before it is acknowledged regardless."""
CONNECTIONS_S: Final = 3.0
KERNEL: Final = -1
"""In the place of a worker's serial: connections that the kernel authorized."""

FromParent = node.PodPut | node.PodRemove | node.SnapshotSent | messages.WorkerChannel | messages.Draining | node.Ack
OnChange = Callable[[World, Diff], Awaitable[None]]
Subscribe = Callable[..., Awaitable[None]]
_log = logging.getLogger("ztunnel.control")


class Control:
    """Construct, then `run`. ``subscribe`` and ``create`` are `ambient.io.xds_client` and `ca_client`, or stand-ins."""

    def __init__(
        self,
        settings: NodeSettings,
        *,
        subscribe: Subscribe = xds_client.subscribe,
        create: Create = ca_client.create_certificate,
    ) -> None:
        self._settings = settings
        self._subscribe = subscribe
        # Answers must be newer than those of an earlier control process, which workers may still hold.
        self._decisions = Decisions(Local.of(settings.node_name), generation=_microseconds_since_boot())
        self._metrics = Metrics()
        self._recorder = Recorder(self._decisions, self._metrics, settings.log_format)
        self._certificates = Certificates(settings, create, self._send)
        self._dns = DnsProxy(
            settings,
            self._names_now,
            requests=self._metrics.dns_requests,
            upstream_requests=self._metrics.dns_upstream_requests,
            upstream_failures=self._metrics.dns_upstream_failures,
            upstream_seconds=self._metrics.dns_upstream_seconds,
        )
        self._flows = KernelFlows(
            settings,
            lambda events: self._recorder.events(KERNEL, messages.Events(events=tuple(events))),
            self._recorder.groups,
            lambda: (self._decisions.world, self._decisions.local),
        )
        self._admin = Admin(settings, self)
        self._names: Names | None = None
        self._links: dict[int, WorkerLink] = {}
        self._alone = asyncio.Event()
        """No worker is connected."""
        self._alone.set()
        self._serial = 0
        self._snapshot = False
        self._draining = False
        self._leaving: dict[str, float] = {}
        self._asked: dict[int, asyncio.Future[messages.Connections]] = {}
        self._question = 0
        self._counted: dict[str, int] = {}
        self._counters: dict[str, int] = {}
        self._level = settings.log_level
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stop = asyncio.Event()
        self._fault: BaseException | None = None

    # --- life

    async def run(self, parent_fd: int) -> int:
        """Until the parent goes or SIGTERM comes. Returns the exit code; a bug ends it with 1, to start afresh."""
        parent: AsyncPacketSocket[Any] = AsyncPacketSocket(socket.socket(fileno=parent_fd), FromParent)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        await self._admin.start()
        self._spawn(self._serve_parent(parent), "parent")
        self._spawn(self._subscribe(self._settings, "ztunnel", self._changed, on_state=self._connected), "discovery")
        self._spawn(self._certificates.run(), "certificates")
        self._spawn(self._tick(), "clock")
        self._spawn(self._flows.run(), "flows of the kernel")
        _log.info("control process ready for questions")
        await self._stop.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for link in self._links.values():
            link.close()
        self._dns.close()
        await self._admin.stop()
        parent.close()
        return 1 if self._fault else 0

    def _spawn(self, work: Awaitable[None], name: str) -> None:
        async def guarded() -> None:
            try:
                await work
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # whatever broke: the parent starts a fresh process at once
                _log.exception("%s failed", name)
                self._fault = error
                self._stop.set()

        task = asyncio.create_task(guarded(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- the parent

    async def _serve_parent(self, parent: AsyncPacketSocket[Any]) -> None:
        while (packet := await parent.receive()) is not None:
            message, fds = packet
            match message:
                case node.PodPut(pod=pod, fds=names):
                    await parent.send(node.Ack(uid=pod.uid, error=await self._put_pod(pod, names, fds)))
                case node.PodRemove(uid=uid, drain_s=drain_s):
                    self._leave(uid, drain_s)
                    await parent.send(node.Ack(uid=uid))
                case node.SnapshotSent():
                    self._snapshot = True
                case messages.WorkerChannel(number=number, pid=pid):
                    if len(fds) != 1:
                        close_all(fds)
                        raise OurFault(f"the stream of worker {number} came with {len(fds)} descriptors")
                    await self._add_worker(number, pid, fds[0])
                case messages.Draining():
                    self._draining = True
                case _:
                    close_all(fds)
        _log.info("the parent is gone")
        await self._outlive_parent()
        self._stop.set()

    async def _outlive_parent(self) -> None:
        """Answer the workers as long as they serve; names too, until a resolver of the next ztunnel is there."""
        self._draining = True
        for limit_s in (messages.ORPHAN_S, self._settings.drain_s + FLUSH_S):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    await self._alone.wait()
            self._dns.close()

    async def _put_pod(self, pod: node.Pod, names: tuple[str, ...], fds: tuple[int, ...]) -> str:
        """Returns what went wrong, or nothing."""
        given = dict(zip(names, fds, strict=True))
        wanted = {name: fd for name, fd in given.items() if name.startswith("dns_")}
        close_all(fd for name, fd in given.items() if name not in wanted and name != node.NETNS)
        if node.NETNS in given:
            self._flows.put_pod(pod, given[node.NETNS])
        self._leaving.pop(pod.uid, None)
        try:
            await self._dns.put_pod(pod, wanted)
            if pod.uid not in self._decisions.local.pods:
                self._metrics.restarts.inc()
            self._deliver(self._decisions.put_pod(pod))
        except (OSError, ValueError) as error:
            _log.error("pod %s/%s: %s", pod.namespace, pod.name, error)
            return f"{type(error).__name__}: {error}"
        self._certificates.put_pod(pod)
        self._metrics.pods.set(len(self._decisions.local.pods))
        return ""

    def _leave(self, uid: str, drain_s: float) -> None:
        """While its connections drain, a pod keeps its routes, verdicts and certificate."""
        if uid not in self._decisions.local.pods:
            return
        # Nothing is sent to its resolver any more, and the agent takes the listeners away when this is answered.
        self._dns.remove_pod(uid)
        if drain_s > 0:
            self._leaving[uid] = time.monotonic() + min(drain_s, 3600.0)
        else:
            self._remove_pod(uid)

    def _remove_pod(self, uid: str) -> None:
        self._leaving.pop(uid, None)
        self._flows.remove_pod(uid)
        self._dns.remove_pod(uid)
        self._deliver(self._decisions.remove_pod(uid))
        self._certificates.remove_pod(uid)
        self._metrics.stops.inc()
        self._metrics.pods.set(len(self._decisions.local.pods))

    # --- workers

    async def _add_worker(self, number: int, pid: int, fd: int) -> None:
        for old in [link for link in self._links.values() if link.number == number]:
            self._worker_gone(old)
        self._serial += 1
        link = await WorkerLink.open(number, pid, self._serial, fd)
        self._links[link.serial] = link
        self._alone.clear()
        link.send(messages.LogLevel(level=self._level))
        self._spawn(self._serve_worker(link), f"worker {number}")

    async def _serve_worker(self, link: WorkerLink) -> None:
        try:
            while (message := await link.receive()) is not None:
                match message:
                    case messages.AskRoute() | messages.AskVerdict():
                        self._deliver(self._decisions.ask(link.serial, message, time.monotonic()))
                    case messages.Forget():
                        self._decisions.forget(link.serial, message)
                    case messages.AskCertificate(identity=identity):
                        self._certificates.ask(link.serial, identity)
                    case messages.Events():
                        self._recorder.events(link.serial, message)
                    case messages.Connections(number=asked):
                        future = self._asked.pop(asked, None)
                        if future is not None and not future.done():
                            future.set_result(message)
                    case _:
                        raise PeerFault(f"worker {link.number} sent {type(message).__name__}")
        except PeerFault as fault:
            _log.error("%s", fault)
        self._worker_gone(link)

    def _worker_gone(self, link: WorkerLink) -> None:
        if self._links.pop(link.serial, None) is None:
            return
        if not self._links:
            self._alone.set()
        link.close()
        self._decisions.forget_worker(link.serial)
        self._certificates.forget_worker(link.serial)
        self._metrics.worker_gone(link.serial)

    def _send(self, serial: int, message: messages.Message) -> None:
        link = self._links.get(serial)
        if link is not None:
            link.send(message)

    def _deliver(self, outgoing: Outgoing) -> None:
        for serial, message in outgoing:
            self._send(serial, message)

    # --- the control plane

    async def _changed(self, world: World, change: Diff) -> None:
        """Put a change into effect in every worker; returning acknowledges it to the control plane."""
        first = self._decisions.world is None
        self._names = None
        self._deliver(self._decisions.apply(world, change))
        self._metrics.workloads_vanished(set(change.removed_workloads), time.monotonic())
        self._metrics.xds_messages.labels("type.googleapis.com/istio.workload.Address").inc()
        if first:
            _log.info("first state: %d workloads, %d services", len(world.workloads), len(world.services))
        try:
            async with asyncio.timeout(FLUSH_S):
                await asyncio.gather(*(link.flush() for link in list(self._links.values())))
        except TimeoutError:
            self._count("change_not_flushed")
            _log.warning("a change did not reach every worker in %.0f s", FLUSH_S)

    def _connected(self, connected: bool, reason: str) -> None:
        if connected:
            self._certificates.retry_failed()
        else:
            self._metrics.xds_terminations.labels("reconnect").inc()

    def _names_now(self) -> Names:
        if self._names is None:
            world = self._decisions.world
            self._names = Names() if world is None else Names.of(world)
        return self._names

    async def _tick(self) -> None:
        swept = time.monotonic()
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            self._deliver(self._decisions.expire(now))
            for uid in [uid for uid, at in self._leaving.items() if at <= now]:
                self._remove_pod(uid)
            if now - swept >= SWEEP_S:
                swept = now
                self._metrics.sweep(now)

    # --- views of the admin endpoint

    def pending(self) -> list[str]:
        found: list[str] = []
        if self._decisions.world is None:
            found.append("state manager")
        if not self._links:
            found.append("proxy")
        if not self._snapshot:
            found.append("workload proxy manager")
        if self._draining:
            found.append("draining")
        return found

    def config_dump(self) -> dump.Json:
        return {
            **dump.world(self._decisions.world),
            "certificates": self.certificates(),
            "workloadState": dump.pods(self._decisions.local),
            "decisions": dump.answers(self._decisions.answers()),
            "version": {"version": product_version(), "python": sys.version.split()[0]},
            "config": msgspec.to_builtins(self._settings),
        }

    def explain(self, query: dict[str, str]) -> dump.Json:
        return explain.explain(self._decisions.world, self._decisions.local, query)

    def certificates(self) -> dump.Json:
        return [
            views.certificate(identity, certificate, error)
            for identity, _, certificate, error in self._certificates.held()
        ]

    async def connections(self) -> dump.Json:
        """Raises TimeoutError if a worker does not answer."""
        waiting: dict[int, asyncio.Future[messages.Connections]] = {}
        for link in list(self._links.values()):
            self._question += 1
            waiting[self._question] = self._asked[self._question] = asyncio.get_running_loop().create_future()
            link.send(messages.AskConnections(number=self._question))
        try:
            async with asyncio.timeout(CONNECTIONS_S):
                answers = await asyncio.gather(*waiting.values())
        finally:
            for number in waiting:
                self._asked.pop(number, None)
        rows: list[dump.Json] = []
        tunnels: list[dump.Json] = []
        for answer in answers:
            rows.extend(views.connection(self._decisions.world, self._decisions.local, row) for row in answer.rows)
            tunnels.extend(dict(t) for t in answer.tunnels)
        return {"connections": rows, "tunnels": tunnels}

    def metrics(self) -> bytes:
        parts = (self._decisions, self._certificates, self._dns, self._flows)
        for source in (self._counters, *(part.counters for part in parts)):
            prefix = f"{id(source)}:"
            deltas = {}
            for name, value in source.items():
                delta = value - self._counted.get(prefix + name, 0)
                if delta > 0:
                    deltas[name] = delta
                    self._counted[prefix + name] = value
            self._metrics.add_counters(deltas)
        return self._metrics.render()

    def level(self) -> str:
        return self._level

    def set_level(self, level: str) -> None:
        logs.set_level(level)
        self._level = level.lower()
        for link in list(self._links.values()):
            link.send(messages.LogLevel(level=self._level))

    def _count(self, name: str) -> None:
        self._counters[name] = self._counters.get(name, 0) + 1


def _microseconds_since_boot() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000


def run_control(settings: NodeSettings, parent_fd: int) -> int:
    """The whole life of a control process. Returns its exit code."""
    try:
        logs.install(settings.log_level, settings.log_format)
    except ValueError as error:
        logs.install("info", settings.log_format)
        _log.error("log_level: %s", error)

    async def main() -> int:
        return await Control(settings).run(parent_fd)

    try:
        return asyncio.run(main())
    except (AmbientError, OSError) as error:
        _log.error("control process: %s", error)
        return 1
