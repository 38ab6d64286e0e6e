"""Flows that the kernel authorized: each closed one exactly once, and the living with their bytes.

A flow that ends is deleted from `flows` by whoever reports it, so it is either in the ring buffer or, when that was
full, still in the map: `ended` reads the one, `sweep` takes the other. The ring buffer's position lives in the kernel,
so what ends while nobody reads is read later, and nothing that a killed process had not used is lost.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import FlowValue, TupleKey
from ambient.errors import AmbientError
from ambient.io import sock_diag
from ambient.io.bpf_maps import Maps
from ambient.io.bpf_ring import RingReader
from ambient.io.bpf_sys import NOEXIST, BpfFault

CLOSED: Final = LAYOUT["END_CLOSED"]
NetnsOf = Callable[[int], int | None]
Which = tuple[int, int]
"""A flow: the cookie of its client's socket, which may be used for another connection, and when it was made."""
"""Cookie of a pod's network namespace -> its descriptor, None if it is not known."""


@dataclass(frozen=True, slots=True)
class LiveFlow:
    """``sent`` and ``received`` as the client sees them, native and redirected together; -1 if they cannot be known."""

    key: TupleKey
    value: FlowValue
    sent: int
    received: int


def is_over(flow: FlowValue) -> bool:
    """Whether both its ends are closed (a server's end that never came about counts as closed)."""
    return bool(flow.client.flags & CLOSED) and (not flow.server.cookie or bool(flow.server.flags & CLOSED))


def bytes_sent(flow: FlowValue) -> int:
    """By the client, of a closed flow."""
    return flow.client.native_bytes + flow.client.redirect_bytes


def bytes_received(flow: FlowValue) -> int:
    """By the client, of a closed flow."""
    return flow.server.native_bytes + flow.server.redirect_bytes


def which(flow: FlowValue) -> Which:
    return flow.client.cookie, flow.created_ns


def never_accepted(flow: FlowValue) -> bool:
    """Of a closed flow: no server had a socket for it. One whose addresses were used again has lost its server's,
    but not what was sent."""
    return not flow.server.cookie and not bytes_sent(flow) and not bytes_received(flow)


class FlowReader:
    """On a node's open maps, which stay the caller's. Only one process may call `consume`."""

    def __init__(self, maps: Maps) -> None:
        self._maps = maps
        self._ring: RingReader | None = None
        self._half: set[tuple[bytes, int]] = set()
        """Keys and client cookies of flows whose client was closed at the last sweep and whose server was not."""

    def fileno(self) -> int:
        """Readable when a flow closed."""
        return self._reader().fileno()

    def _reader(self) -> RingReader:
        if self._ring is None:
            self._ring = RingReader(self._maps.tables["events"].fd)
        return self._ring

    def close(self) -> None:
        if self._ring is not None:
            self._ring.close()
            self._ring = None

    def ended(self, limit: int) -> tuple[list[bytes], int]:
        """Flows that ended since what was consumed, oldest first, as undecoded flow_events, and the position for
        `consume` once they are used. Raises BpfFault, OSError."""
        return self._reader().peek(limit)

    def consume(self, position: int) -> None:
        self._reader().consume(position)

    def sweep(self) -> Iterator[bytes]:
        """Flows that ended and found no room in the ring buffer, and those whose client had ended at the last sweep:
        nothing moves in them any more, and a server that never closes its ends would fill the map. As `ended`'s."""
        table = self._maps.tables["flows"]
        half: set[tuple[bytes, int]] = set()
        for raw, value in table.items():
            flow = FlowValue.decode(value)
            mark = (raw, flow.client.cookie)
            if not is_over(flow) and mark not in self._half:
                if flow.client.flags & CLOSED:
                    half.add(mark)
                continue
            if (taken := self._take(raw, flow)) is not None:
                yield raw + taken + time.monotonic_ns().to_bytes(8, "little")
        self._half = half

    def _take(self, raw: bytes, flow: FlowValue) -> bytes | None:
        """Take that very flow. A connection that has its addresses by now lives, and must stay where it is found."""
        table = self._maps.tables["flows"]
        now = table.lookup(raw)
        if now is None or not _is_same(now, flow):
            return None
        taken = table.take(raw)
        if taken is None or _is_same(taken, flow):
            return taken
        with contextlib.suppress(BpfFault):  # the next one has the place already
            table.update(raw, taken, NOEXIST)
        return None

    def live(self, netns_of: NetnsOf, wanted: Iterable[tuple[TupleKey, FlowValue]] | None = None) -> list[LiveFlow]:
        """Flows that are not over, with both directions' bytes, asked of the client's socket. Raises BpfFault."""
        entries = self._maps.flows.items() if wanted is None else list(wanted)
        by_netns: dict[int, list[tuple[TupleKey, FlowValue]]] = {}
        for key, value in entries:
            if not is_over(value):
                by_netns.setdefault(value.netns_client, []).append((key, value))
        found: list[LiveFlow] = []
        for cookie, flows in by_netns.items():
            sockets = self._sockets(netns_of(cookie))
            for key, value in flows:
                found.append(_live(key, value, sockets))
        return found

    def _sockets(self, netns_fd: int | None) -> dict[int, sock_diag.TcpSocket]:
        if netns_fd is None:
            return {}
        try:
            with sock_diag.open_diag(netns_fd) as sock:
                return {s.cookie: s for s in sock_diag.dump(sock)}
        except (OSError, AmbientError):
            return {}


def _is_same(raw: bytes, flow: FlowValue) -> bool:
    return which(FlowValue.decode(raw)) == which(flow)


def _live(key: TupleKey, value: FlowValue, sockets: dict[int, sock_diag.TcpSocket]) -> LiveFlow:
    client = sockets.get(value.client.cookie)
    if client is None:
        if value.client.flags & CLOSED:  # known to the map; what the server may still send is lost on its way
            return LiveFlow(key, value, bytes_sent(value), bytes_received(value))
        return LiveFlow(key, value, -1, -1)
    sent, received = sock_diag.data_bytes(client, accepted=False)
    return LiveFlow(key, value, sent + value.client.redirect_bytes, received + value.server.redirect_bytes)
