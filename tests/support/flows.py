"""What became of connections that the kernel authorized, by its own account of each: none is missed, however short.

Closed flows are read from the ring buffer `events` beside ztunnel, which consumes them, without consuming them.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import FlowEnd, FlowEvent, FlowValue
from ambient.io.bpf_maps import Maps
from ambient.io.bpf_ring import RingReader
from ambient.io.flow_reader import FlowReader
from ambient.lab.driver import eventually

ACCELERATIONS = {LAYOUT["ACCELERATION_DIRECT"]: "direct", LAYOUT["ACCELERATION_REDIRECT"]: "redirect"}
ZTUNNELS = ("captured", "not_synced", "hbone")
"""Reasons that are counted when a pod's connection is sent to ztunnel, or comes from one."""


def closed(reader: FlowReader) -> list[FlowEvent]:
    """Flows that ended since the last call, oldest first."""
    records, position = reader.ended(4096)
    reader.consume(position)
    return [FlowEvent.decode(raw) for raw in records]


def swept(reader: FlowReader) -> list[FlowEvent]:
    """What `sweep` takes."""
    return [FlowEvent.decode(raw) for raw in reader.sweep()]


class Beside(RingReader):
    """Records from now on, read without telling the kernel, because another process consumes them.

    What is more than the ring buffer's size behind is overwritten: read before 800 flows have closed.
    """

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._position = ctypes.c_uint64(int.from_bytes(self._producer[:8], "little"))


@dataclass(frozen=True)
class Sent:
    """Bytes that one side's ends sent, by the way they went."""

    native: int
    redirected: int

    @property
    def all(self) -> int:
        return self.native + self.redirected

    def __str__(self) -> str:
        return f"{self.native} native and {self.redirected} redirected"


def sent(ends: Iterable[FlowEnd]) -> Sent:
    known = list(ends)
    return Sent(sum(e.native_bytes for e in known), sum(e.redirect_bytes for e in known))


class Witness:
    """The connections to a pod's addresses that are made and closed inside the block.

    Leaving it waits until they have ended, and fails if there were none, if one of them was not accelerated as said
    (and if bytes of `direct` ones were redirected), or if any connection of the node's pods went to ztunnel meanwhile.
    """

    def __init__(self, maps: Maps, addresses: Iterable[str], acceleration: str) -> None:
        self._maps, self._addresses, self.acceleration = maps, frozenset(addresses), acceleration
        self.flows: list[FlowValue] = []

    def __enter__(self) -> Witness:
        self._since_ns = time.monotonic_ns()
        self._events = Beside(self._maps.tables["events"].fd)
        self._before = self._maps.counters()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                # Once more after the last has gone: it is told before it goes.
                eventually(lambda: self._over() and self._over(), 10, "the connections to end")
                self._judge()
        finally:
            self._events.close()

    def _over(self) -> bool:
        records, position = self._events.peek(4096)
        self._events.consume(position)
        for raw in records:
            event = FlowEvent.decode(raw)
            if event.key.local in self._addresses and event.value.created_ns >= self._since_ns:
                self.flows.append(event.value)
        return not any(
            key.local in self._addresses and flow.created_ns >= self._since_ns for key, flow in self._maps.flows.items()
        )

    def _judge(self) -> None:
        now = self._maps.counters()
        counted = {
            reason: now[reason] - self._before.get(reason, 0)
            for reason in now
            if now[reason] != self._before.get(reason, 0)
        }
        assert not any(counted.get(reason, 0) for reason in ZTUNNELS), f"not by the kernel alone: {counted}"
        assert self.flows, "there was no connection"
        # One that went to ztunnel on its way, by another generation of its destination, has no end there.
        assert all(flow.server.cookie for flow in self.flows), f"steered: {counted}"
        assert {ACCELERATIONS[flow.acceleration] for flow in self.flows} == {self.acceleration}
        assert self.acceleration == "redirect" or not self.redirected

    @property
    def to_server(self) -> Sent:
        return sent(flow.client for flow in self.flows)

    @property
    def to_client(self) -> Sent:
        return sent(flow.server for flow in self.flows)

    @property
    def redirected(self) -> int:
        return self.to_server.redirected + self.to_client.redirected

    def __str__(self) -> str:
        there, back = self.to_server, self.to_client
        return f"{self.acceleration}: {len(self.flows)} connections: {there} bytes to the server, {back} to the client"
