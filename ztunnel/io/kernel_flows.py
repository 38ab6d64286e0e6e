"""Connections that the kernel authorized, told to metrics and access log as if ztunnel had carried them.

Both reporters are this node's, because both ends are. A flow is known when it closes, by the ring buffer, and while it
lives by a look each `PROGRESS_S`, which gives long ones their bytes. Counted exactly once while this process lives: the
kernel keeps what nobody read. Across a restart the bytes already told are in `kernel_flows.json` of the run directory;
what was told after it was last written, at most `PROGRESS_S` of each flow, counts twice then. A record stays in the
kernel until it was told of, so a kill in between repeats lines of the log. One process reads at a time; the next
waits for the lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from ambient.datapath.render import socket_text
from ambient.datapath.values import FlowEvent, FlowValue, TupleKey
from ambient.errors import AmbientError
from ambient.io.bpf_maps import Maps
from ambient.io.flow_reader import FlowReader, Which, bytes_received, bytes_sent, never_accepted, which
from ambient.model.address import parse_ip
from ambient.model.world import World
from ambient.node.messages import Pod
from ambient.settings import NodeSettings
from ztunnel.core.attributes import describe
from ztunnel.core.local import Local, identity_of
from ztunnel.core.messages import ConnectionEvent
from ztunnel.io import access_log
from ztunnel.io.flow_groups import Group, Groups, Told

PROGRESS_S: Final = 10.0
READ_S: Final = 0.05
"""From the first flow that ended to the look at it and all that ended meanwhile: one wake-up for many."""
RETRY_S: Final = 1.0
BATCH: Final = 512
READS_MAX: Final = 16
_log = logging.getLogger("ztunnel.kernel_flows")


@dataclass(slots=True)
class _Known:
    """A flow that was told of: its two numbers and the totals so far."""

    number: int
    sent: int
    received: int


class KernelFlows:
    """``tell`` takes events of both reporters, ``tell_groups`` flows whose opening was not told; ``see`` gives World
    and pods as they are now."""

    def __init__(
        self,
        settings: NodeSettings,
        tell: Callable[[list[ConnectionEvent]], None],
        tell_groups: Callable[[list[Group]], None],
        see: Callable[[], tuple[World | None, Local]],
    ) -> None:
        self._bpffs = settings.bpffs_dir
        self._run_dir = Path(settings.run_dir)
        self._log_format = settings.log_format
        self._tell = tell
        self._tell_groups = tell_groups
        self._groups = Groups(self._group)
        self._seen: tuple[World | None, Local | None] = (None, None)
        self._soon: asyncio.TimerHandle | None = None
        self._see = see
        self._netns: dict[str, tuple[int, int]] = {}
        self._known: dict[Which, _Known] = {}
        self._before: dict[Which, tuple[int, int]] = {}
        self._next = 1
        self._policies: dict[int, str] = {}
        self._reader: FlowReader | None = None
        self.counters: dict[str, int] = {}

    # --- pods

    def put_pod(self, pod: Pod, netns_fd: int) -> None:
        """The descriptor becomes ours."""
        self.remove_pod(pod.uid)
        self._netns[pod.uid] = (pod.netns_cookie, netns_fd)

    def remove_pod(self, uid: str) -> None:
        """What ended so far is told while its names are known."""
        if uid in self._netns:
            self.read()
            os.close(self._netns.pop(uid)[1])

    def _netns_of(self, cookie: int) -> int | None:
        return next((fd for known, fd in self._netns.values() if known == cookie), None)

    # --- life

    async def run(self) -> None:
        """For ever. What goes wrong is logged and tried again."""
        lock = os.open(self._run_dir / "kernel_flows.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while not _locked(lock):  # noqa: ASYNC110  (another process holds it)
                await asyncio.sleep(RETRY_S)
            self._before = self._load()
            said = ""
            while True:
                try:
                    with Maps.open(self._bpffs) as maps:
                        await self._follow(maps)
                except (AmbientError, OSError) as error:
                    if str(error) != said:
                        said = str(error)
                        _log.info("flows of the kernel cannot be read yet: %s", said)
                await asyncio.sleep(RETRY_S)
        finally:
            os.close(lock)

    async def _follow(self, maps: Maps) -> None:
        reader = self._reader = FlowReader(maps)
        loop = asyncio.get_running_loop()
        try:
            loop.add_reader(reader.fileno(), self._readable, loop, reader.fileno())
            while True:
                self._look(reader)
                await asyncio.sleep(PROGRESS_S)
        finally:
            self._reader = None
            if self._soon is not None:
                self._soon.cancel()
                self._soon = None
            with contextlib.suppress(OSError, AmbientError):
                loop.remove_reader(reader.fileno())
            reader.close()

    def _readable(self, loop: asyncio.AbstractEventLoop, fd: int) -> None:
        """The kernel wakes nobody up while there is something unread, so a look some time later finds many."""
        loop.remove_reader(fd)
        self._soon = loop.call_later(READ_S, self._read_soon, loop, fd)

    def _read_soon(self, loop: asyncio.AbstractEventLoop, fd: int) -> None:
        self._soon = None
        if self._read_batch():
            self._soon = loop.call_later(0, self._read_soon, loop, fd)
        elif self._reader is not None:
            loop.add_reader(fd, self._readable, loop, fd)

    def read(self) -> None:
        """Tell of what the ring buffer holds."""
        for _ in range(READS_MAX):
            if not self._read_batch():
                return

    def _read_batch(self) -> bool:
        """Tell of some of it; whether there may be more."""
        if self._reader is None:
            return False
        try:
            records, position = self._reader.ended(BATCH)
        except (AmbientError, OSError) as error:
            _log.error("ring buffer of closed flows: %s", error)
            return False
        try:
            self._ended(records)
        finally:
            self._reader.consume(position)
        return len(records) == BATCH

    def _ended(self, records: list[bytes]) -> None:
        """Tell of flow_events: in groups what can be, one by one what was told of while it lived."""
        if not records:
            return
        world, local = self._see()
        if world is not self._seen[0] or local is not self._seen[1]:
            self._seen = (world, local)
            self._groups.clear()
        groups: list[Group] = []
        single = records
        if not logging.getLogger(access_log.SCOPE).isEnabledFor(logging.DEBUG):  # else each opening has a line
            groups, single = self._groups.sort(records, self._known, self._before)
        if groups:
            self._tell_groups(groups)
        events: list[ConnectionEvent] = []
        for raw in single:
            try:
                closed = FlowEvent.decode(raw)
                events += self._closed(closed.key, closed.value, closed.closed_ns)
            except ValueError as error:
                self._count("kernel_flow_unreadable")
                _log.error("record of a closed flow: %s", error)
        if events:
            self._tell(events)

    def _group(self, raw: bytes) -> Group:
        closed = FlowEvent.decode(raw)
        world, local = self._see()
        told: list[Told] = []
        for event in self._pair(closed.key, closed.value, "closed", _Known(0, 0, 0), 0, 0, closed.closed_ns):
            ends = describe(world, local, event)
            told.append(Told(event, ends, access_log.template(event, ends, self._log_format)))
        return Group(tuple(told))

    def _look(self, reader: FlowReader) -> None:
        """Tell of what found no room in the ring buffer, and of the progress of what lives."""
        self.read()
        self._ended(list(reader.sweep()))
        events: list[ConnectionEvent] = []
        now = time.monotonic_ns()
        for flow in reader.live(self._netns_of):
            if flow.sent >= 0 and flow.value.server.cookie:
                events += self._progress(flow.key, flow.value, flow.sent, flow.received, now)
        if events:
            self._tell(events)
        self._save()

    # --- events

    def _take(self, flow: FlowValue) -> tuple[_Known, bool]:
        """The flow's place, and whether it is new to this process."""
        key = which(flow)
        known = self._known.get(key)
        if known is not None:
            return known, False
        known = self._known[key] = _Known(self._next, *self._before.pop(key, (0, 0)))
        self._next += 2
        return known, True

    def _closed(self, key: TupleKey, flow: FlowValue, closed_ns: int) -> list[ConnectionEvent]:
        if never_accepted(flow) and which(flow) not in self._known:
            # Refused, timed out or closed. The application was told so.
            self._count("kernel_connect_failed")
            return self._pair(key, flow, "failed", _Known(self._new_number(), 0, 0), 0, 0, closed_ns)
        known, new = self._take(flow)
        sent, received = bytes_sent(flow), bytes_received(flow)
        events = self._pair(key, flow, "opened", known, known.sent, known.received, closed_ns) if new else []
        events += self._pair(key, flow, "closed", known, sent, received, closed_ns)
        del self._known[which(flow)]
        return events

    def _progress(self, key: TupleKey, flow: FlowValue, sent: int, received: int, now: int) -> list[ConnectionEvent]:
        known, new = self._take(flow)
        events = self._pair(key, flow, "opened", known, known.sent, known.received, now) if new else []
        if (sent, received) != (known.sent, known.received):
            events += self._pair(key, flow, "progress", known, sent, received, now)
        return events

    def _pair(
        self, key: TupleKey, flow: FlowValue, event: str, known: _Known, sent: int, received: int, now: int
    ) -> list[ConnectionEvent]:
        world, local = self._see()
        source = next((p for p in local.pods.values() if p.netns_cookie == flow.netns_client), None)
        destination = local.owner(parse_ip(key.local))
        original = parse_ip(flow.original) if flow.original else None
        service = world.service_at(original) if world is not None and original is not None else None
        delta_sent, delta_received = max(0, sent - known.sent), max(0, received - known.received)
        known.sent, known.received = max(known.sent, sent), max(known.received, received)
        common: dict[str, Any] = {
            "event": event,
            "source_address": socket_text(key.remote, key.remote_port),
            "destination_address": socket_text(key.local, key.local_port),
            "original": socket_text(flow.original, flow.original_port),
            "service": service.key if service is not None else "",
            "destination": destination.workload_uid if destination is not None else "",
            "source_identity": _identity(source),
            "destination_identity": _identity(destination),
            "protocol": "kernel",
            "sent": delta_sent,
            "received": delta_received,
            "duration_ms": max(0, now - flow.created_ns) / 1e6,
            "policy": self._policy(flow.policy),
            "error": "nobody accepted the connection" if event == "failed" else "",
            "at": time.time(),
        }
        return [
            ConnectionEvent(connection=known.number + side, reporter=reporter, local=pod.uid if pod else "", **common)
            for side, (reporter, pod) in enumerate((("source", source), ("destination", destination)))
            if event != "failed" or reporter == "source"
        ]

    def _new_number(self) -> int:
        self._next += 2
        return self._next - 2

    def _policy(self, number: int) -> str:
        """Its name, as the agent wrote it down."""
        if number and number not in self._policies:
            with contextlib.suppress(OSError, ValueError, msgspec.DecodeError):
                raw = msgspec.json.decode((self._run_dir / "names.json").read_bytes())
                self._policies = {int(n): str(name) for n, name in raw.get("policies", {}).items()}
        return self._policies.get(number, "")

    def _count(self, name: str) -> None:
        self.counters[name] = self.counters.get(name, 0) + 1

    # --- across restarts

    def _load(self) -> dict[Which, tuple[int, int]]:
        try:
            raw = (self._run_dir / "kernel_flows.json").read_bytes()
            rows = msgspec.json.decode(raw, type=list[tuple[int, int, int, int]])
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return {}
        return {(cookie, created_ns): (sent, received) for cookie, created_ns, sent, received in rows}

    def _save(self) -> None:
        told = [(*flow, known.sent, known.received) for flow, known in self._known.items()]
        aside = self._run_dir / ".kernel_flows.json.new"
        try:
            aside.write_bytes(msgspec.json.encode(told))
            aside.replace(self._run_dir / "kernel_flows.json")
        except OSError as error:
            _log.error("kernel_flows.json: %s", error)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _identity(pod: Pod | None) -> str:
    try:
        return str(identity_of(pod)) if pod is not None else ""
    except ValueError:
        return ""
