"""Both ends for codec tests: our connection with an echoing owner, and ways to split bytes."""

from __future__ import annotations

from collections.abc import Iterable

from ztunnel.core.frames import Code
from ztunnel.core.headers import STATUS_200, Header
from ztunnel.core.http2 import CLIENT_LIMITS, FULL, SERVER_LIMITS, Connection, Limits, Role
from ztunnel.core.output import BufferPool, Output
from ztunnel.core.streams import DISCARD, Stream

POOL = BufferPool(64 * 1024)


class Carrier:
    """Owner of one stream: keeps what came, sends what it is told, with `reserve` and `commit`."""

    def __init__(self, peer: Peer, stream: Stream | None = None, *, echo: bool = False) -> None:
        self.peer = peer
        self.stream = stream
        self.echo = echo
        self.fields: list[Header] | None = None
        self.received = bytearray()
        self.to_send = bytearray()
        self.finish = False
        self.ended = False
        self.reset_code: int | None = None

    def stream_headers(self, fields: list[Header]) -> None:
        self.fields = fields

    def stream_data(self, data: memoryview) -> None:
        assert self.stream is not None and not self.ended and self.reset_code is None
        self.received += data
        self.peer.connection.consumed(self.stream, len(data))
        if self.echo:
            self.to_send += data
            self.pump()

    def stream_end(self) -> None:
        assert not self.ended
        self.ended = True
        if self.echo:
            self.finish = True
            self.pump()

    def stream_reset(self, code: int) -> None:
        assert self.reset_code is None
        self.reset_code = code

    def stream_writable(self) -> None:
        self.pump()

    def pump(self) -> None:
        stream, connection = self.stream, self.peer.connection
        assert stream is not None
        while self.to_send and not stream.dead:
            room = connection.reserve(stream)
            if room is None:
                return
            if room is FULL:
                self.peer.flush()
                continue
            count = min(len(room), len(self.to_send))
            room[:count] = self.to_send[:count]
            connection.commit(stream, count)
            del self.to_send[:count]
        if self.finish and not stream.dead:
            connection.finish(stream)


class Peer:
    """Our side of one connection; ``sent`` is what it has to say."""

    def __init__(self, role: Role, limits: Limits | None = None, *, accept: bool = True, now: float = 0.0) -> None:
        self.now = now
        self.accept = accept
        self.carriers: list[Carrier] = []
        self.requests: list[list[Header]] = []
        self.away = 0
        self.sent = bytearray()
        limits = limits or (CLIENT_LIMITS if role is Role.CLIENT else SERVER_LIMITS)
        self.connection = Connection(role, self, Output(POOL), limits, now)

    def request(self, stream: Stream, fields: list[Header]) -> None:
        assert stream.owner is DISCARD
        self.requests.append(fields)
        carrier = Carrier(self, stream, echo=True)
        stream.owner = carrier
        self.carriers.append(carrier)
        if self.accept:
            self.connection.respond(stream, STATUS_200)

    def going_away(self) -> None:
        self.away += 1

    def flush(self) -> None:
        self.sent += self.connection.output.drain()

    def feed(self, data: bytes) -> None:
        self.connection.receive(memoryview(data), self.now)
        self.flush()

    def take(self) -> bytes:
        self.flush()
        out = bytes(self.sent)
        self.sent.clear()
        return out

    @property
    def code(self) -> Code | None:
        return self.connection.fault[0] if self.connection.fault else None


def split(data: bytes, sizes: Iterable[int]) -> Iterable[bytes]:
    """``data`` in pieces of these sizes, the rest at once; no empty pieces."""
    at = 0
    for size in sizes:
        if at >= len(data):
            return
        yield data[at : at + size]
        at += size
    if at < len(data):
        yield data[at:]
