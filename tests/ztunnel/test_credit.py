"""Credit of streams and of their connection: who reads quickly gets more, and who stops takes nobody's."""

from __future__ import annotations

import pytest

from tests.ztunnel.http2_peers import Carrier, Peer
from ztunnel.core.headers import encode
from ztunnel.core.http2 import SERVER_LIMITS, Role
from ztunnel.core.streams import DISCARD, Stream

CONNECT = encode([(b":method", b"CONNECT"), (b":authority", b"10.0.0.1:80")])
MIB = 1024 * 1024


class Reader(Carrier):
    """Consumes what comes unless it ``stopped``."""

    stopped = False
    waiting = 0

    def stream_data(self, data: memoryview) -> None:
        assert self.stream is not None
        self.received += data
        if self.stopped:
            self.waiting += len(data)
        else:
            self.peer.connection.consumed(self.stream, len(data))

    def go_on(self) -> None:
        """Take what waited."""
        assert self.stream is not None
        self.stopped = False
        self.peer.connection.consumed(self.stream, self.waiting)


class Pair:
    """A client and a server joined, with ``count`` streams; each end's carriers are in the same order."""

    def __init__(self, count: int, round_trip_s: float = 0.0) -> None:
        self.client, self.server = Peer(Role.CLIENT), Peer(Role.SERVER)
        self.later(round_trip_s)
        self.exchange()
        self.writers = [Carrier(self.client) for _ in range(count)]
        for writer in self.writers:
            writer.stream = self.client.connection.open(writer, CONNECT)
        self.exchange()
        self.readers: list[Reader] = []
        for carrier in self.server.carriers:
            assert carrier.stream is not None and carrier.stream.owner is not DISCARD
            reader = Reader(self.server, carrier.stream)
            carrier.stream.owner = reader
            self.readers.append(reader)

    def exchange(self) -> None:
        while True:
            out, back = self.client.take(), self.server.take()
            if not out and not back:
                return
            self.server.feed(out)
            self.client.feed(back)

    def send(self, number: int, count: int) -> int:
        """How many of these bytes arrived now."""
        before = len(self.readers[number].received)
        self.writers[number].to_send += bytes(count)
        self.writers[number].pump()
        self.exchange()
        return len(self.readers[number].received) - before

    def window(self, number: int) -> int:
        stream = self.readers[number].stream
        assert stream is not None
        return stream.window

    def later(self, seconds: float) -> None:
        self.client.now += seconds
        self.server.now += seconds


@pytest.mark.parametrize("quick_before", [0, 2, 99], ids=lambda count: f"{count} were quick before")
def test_readers_that_stop_leave_the_credit_of_the_others_alone(quick_before: int):
    pair = Pair(100)
    for number in range(quick_before):
        assert pair.send(number, 4 * MIB) == 4 * MIB
    for reader in pair.readers[:99]:
        reader.stopped = True
    taken = sum(pair.send(number, 5 * MIB) for number in range(99))
    assert 99 * SERVER_LIMITS.stream_window <= taken < SERVER_LIMITS.connection_window
    for _ in range(8):
        assert pair.send(99, 4 * MIB) == 4 * MIB, "the one that reads gets all"
    for reader in pair.readers[:99]:
        reader.go_on()
    pair.exchange()
    assert all(
        len(reader.received) == (9 if n < quick_before else 5) * MIB for n, reader in enumerate(pair.readers[:99])
    )


def test_a_quick_reader_s_window_grows_to_the_limit_and_a_slow_one_s_shrinks():
    pair = Pair(1)
    assert pair.window(0) == SERVER_LIMITS.stream_window
    pair.send(0, 16 * MIB)
    assert pair.window(0) == SERVER_LIMITS.stream_window_max
    for _ in range(200):
        pair.later(0.5)
        pair.send(0, 128 * 1024)
    assert pair.window(0) <= 512 * 1024, "half of it lasts a second"


@pytest.mark.parametrize(
    ("round_trip_s", "window"), [(0.3, SERVER_LIMITS.stream_window_max), (0.001, SERVER_LIMITS.stream_window)]
)
def test_a_window_grows_over_a_long_way_where_half_of_it_takes_half_a_round_trip(round_trip_s: float, window: int):
    pair = Pair(1, round_trip_s)
    for _ in range(10):
        pair.later(0.15)
        pair.send(0, pair.window(0) // 2)
    assert pair.window(0) == window


def test_what_ended_streams_had_is_there_for_later_ones():
    pair = Pair(50)
    for number in range(50):
        pair.send(number, 5 * MIB)
    grown = [pair.window(number) for number in range(50)]
    assert grown[0] == SERVER_LIMITS.stream_window_max and grown[-1] == SERVER_LIMITS.stream_window
    for reader in pair.readers[:49]:
        stream: Stream | None = reader.stream
        assert stream is not None
        pair.server.connection.reset(stream, 8)  # type: ignore[arg-type]
    pair.exchange()
    pair.send(49, 16 * MIB)
    assert pair.window(49) == SERVER_LIMITS.stream_window_max
