"""Our HTTP/2 against the h2 library: any split of the bytes, any legal order of frames, both roles."""

from __future__ import annotations

from collections.abc import Iterator

import h2.config
import h2.connection
import h2.events
import h2.settings
import h2.windows
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ztunnel.http2_peers import Carrier, Peer, split
from ztunnel.core.frames import Code
from ztunnel.core.headers import STATUS_200, encode
from ztunnel.core.http2 import Role
from ztunnel.core.streams import Stream

CONNECT = [(":method", "CONNECT"), (":authority", "10.0.0.1:80"), ("baggage", "k8s.pod.name=a"), ("x-long", "v" * 300)]

sizes = st.lists(st.integers(1, 4000), max_size=40)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("open"), st.just(0), st.just(0)),
        st.tuples(st.just("data"), st.integers(0, 5), st.integers(0, 90_000)),
        st.tuples(st.just("padded"), st.integers(0, 5), st.integers(0, 200)),
        st.tuples(st.just("end"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("reset"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("ping"), st.just(0), st.just(0)),
        st.tuples(st.just("window"), st.just(0), st.integers(0, 300_000)),
        st.tuples(st.just("priority"), st.integers(0, 5), st.integers(1, 256)),
    ),
    max_size=30,
)


@pytest.fixture(scope="module", autouse=True)
def empty_frames_need_no_window() -> Iterator[None]:
    """RFC 9113, 6.9.1: an empty frame that ends a stream may be sent where there is no window; SETTINGS can make it
    negative (6.9.2), and there h2 takes the empty frame for too much."""
    refuses = h2.windows.WindowManager.window_consumed

    def consumed(window: h2.windows.WindowManager, size: int) -> None:
        if size:
            refuses(window, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(h2.windows.WindowManager, "window_consumed", consumed)
        yield


class Oracle:
    """The h2 library on the other side; what it received, by stream."""

    def __init__(self, *, client: bool) -> None:
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=client, header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.received: dict[int, bytearray] = {}
        self.ended: set[int] = set()
        self.resets: set[int] = set()
        self.statuses: dict[int, str] = {}
        self.requests: list[int] = []
        self.pings = 0
        self.terminated = False

    def feed(self, data: bytes) -> None:
        for event in self.h2.receive_data(data):
            match event:
                case h2.events.RequestReceived(stream_id=stream):
                    self.requests.append(stream)
                case h2.events.ResponseReceived(stream_id=stream, headers=fields):
                    self.statuses[stream] = dict(fields)[":status"]
                case h2.events.DataReceived(stream_id=stream, data=part, flow_controlled_length=count):
                    self.received.setdefault(stream, bytearray()).extend(part)
                    self.h2.acknowledge_received_data(count, stream)
                case h2.events.StreamEnded(stream_id=stream):
                    self.ended.add(stream)
                case h2.events.StreamReset(stream_id=stream):
                    self.resets.add(stream)
                case h2.events.PingAckReceived():
                    self.pings += 1
                case h2.events.ConnectionTerminated():
                    self.terminated = True


def exchange(oracle: Oracle, ours: Peer, pieces: list[int]) -> None:
    """Move bytes both ways until both are silent."""
    while True:
        theirs = oracle.h2.data_to_send()
        for part in split(theirs, pieces):
            ours.feed(part)
        mine = ours.take()
        for part in split(mine, pieces):
            oracle.feed(part)
        if not theirs and not mine:
            return


@settings(max_examples=120, deadline=None)
@given(actions=actions, pieces=sizes)
def test_a_server_echoes_exactly_what_any_legal_client_sends(actions: list[tuple[str, int, int]], pieces: list[int]):
    oracle, ours = Oracle(client=True), Peer(Role.SERVER)
    sent: dict[int, bytearray] = {}
    open_streams: list[int] = []
    was_reset: set[int] = set()
    pings = 0
    acknowledged = False
    for action, which, size in actions:
        stream = open_streams[which % len(open_streams)] if open_streams else None
        if action == "open" and len(sent) < 50:
            stream = oracle.h2.get_next_available_stream_id()
            oracle.h2.send_headers(stream, CONNECT)
            sent[stream] = bytearray()
            open_streams.append(stream)
        elif action == "ping":
            oracle.h2.ping(b"12345678")
            pings += 1
        elif action == "window":
            if not acknowledged:  # h2 takes the acknowledgement of its first SETTINGS for that of these
                exchange(oracle, ours, pieces)
                acknowledged = True
            oracle.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: size})
        elif stream is None:
            continue
        elif action == "data":
            payload = bytes([len(sent) & 0xFF, which]) * (size // 2)
            at = 0
            while at < len(payload):
                room = min(oracle.h2.local_flow_control_window(stream), oracle.h2.max_outbound_frame_size)
                if room <= 0:
                    break
                oracle.h2.send_data(stream, payload[at : at + room])
                sent[stream] += payload[at : at + room]
                at += room
        elif action == "padded":
            if oracle.h2.local_flow_control_window(stream) > size + 100:
                oracle.h2.send_data(stream, b"p" * size, pad_length=size)
                sent[stream] += b"p" * size
        elif action == "priority":
            oracle.h2.prioritize(stream, weight=size)
        elif action == "end":
            oracle.h2.end_stream(stream)
            open_streams.remove(stream)
        elif action == "reset":
            oracle.h2.reset_stream(stream)
            open_streams.remove(stream)
            was_reset.add(stream)
        if which % 2:
            exchange(oracle, ours, pieces)
    oracle.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1 << 24})
    exchange(oracle, ours, pieces)
    assert ours.code is None and not oracle.terminated
    assert oracle.pings == pings
    for stream in sent.keys() - was_reset:
        assert oracle.statuses[stream] == "200"
        assert oracle.received.get(stream, b"") == sent[stream]
        assert (stream in oracle.ended) == (stream not in open_streams)
    assert set(ours.connection.streams) == set(open_streams)


@settings(max_examples=120, deadline=None)
@given(actions=actions, pieces=sizes)
def test_a_client_gets_exactly_what_any_legal_server_sends(actions: list[tuple[str, int, int]], pieces: list[int]):
    oracle, ours = Oracle(client=False), Peer(Role.CLIENT)
    block = encode([(name.encode(), value.encode()) for name, value in CONNECT])
    exchange(oracle, ours, pieces)
    answered: set[int] = set()
    ended: set[int] = set()
    echoed: dict[int, bytearray] = {}
    was_reset: set[int] = set()
    for action, which, size in actions:
        live = [c for c in ours.carriers if c.stream and not c.stream.dead and c.reset_code is None]
        carrier = live[which % len(live)] if live else None
        if action == "open" and len(ours.carriers) < 50 and ours.connection.can_open:
            carrier = Carrier(ours)
            carrier.stream = ours.connection.open(carrier, block)
            ours.carriers.append(carrier)
        elif action == "ping":
            oracle.h2.ping(b"12345678")
        elif action == "window":
            oracle.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: size})
        elif carrier is None or carrier.stream is None:
            continue
        elif action == "data" and not carrier.finish:
            carrier.to_send += bytes([which + 1]) * size
            echoed.setdefault(carrier.stream.id, bytearray()).extend(bytes([which + 1]) * size)
            carrier.pump()
        elif action == "end" and not carrier.finish:
            carrier.finish = True
            carrier.pump()
        elif action == "reset":
            stream = carrier.stream.id
            if stream in oracle.requests and stream not in ended:
                oracle.h2.reset_stream(stream)
                was_reset.add(stream)
        exchange(oracle, ours, pieces)
        for stream in oracle.requests:
            if stream in was_reset or stream in ended:
                continue
            if stream not in answered:
                oracle.h2.send_headers(stream, [(":status", "200"), ("baggage", "x=y" * 30)])
                answered.add(stream)
            while action in ("data", "padded", "priority") and oracle.h2.local_flow_control_window(stream) > 30_000:
                oracle.h2.send_data(stream, b"d" * min(size, 16000), pad_length=which)
                oracle.received.setdefault(-stream, bytearray()).extend(b"d" * min(size, 16000))
                break
            if stream in oracle.ended:
                oracle.h2.end_stream(stream)
                ended.add(stream)
        exchange(oracle, ours, pieces)
    oracle.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1 << 24})
    exchange(oracle, ours, pieces)
    assert ours.code is None and not oracle.terminated
    for carrier in ours.carriers:
        assert carrier.stream is not None
        stream = carrier.stream.id
        if stream in was_reset:
            assert carrier.reset_code is not None
            continue
        assert carrier.received == oracle.received.get(-stream, b"")
        assert oracle.received.get(stream, b"") == echoed.get(stream, b"")
        assert carrier.ended == (stream in ended)
        if stream in answered:
            assert carrier.fields is not None and carrier.fields[0] == (b":status", b"200")


@settings(max_examples=200, deadline=None)
@given(
    fields=st.lists(
        st.tuples(
            st.sampled_from([b"baggage", b"forwarded", b"x-very-special", b"via", b":authority", b"cookie"]),
            st.binary(max_size=400),
        ),
        max_size=12,
    )
)
def test_header_blocks_decode_to_what_was_encoded_here_and_by_hpack(fields: list[tuple[bytes, bytes]]):
    import hpack

    from ztunnel.core.headers import Decoder, decode_plain

    block = encode(fields)
    assert decode_plain(block) == fields
    assert [(bytes(a), bytes(b)) for a, b in hpack.Decoder().decode(block, raw=True)] == fields
    decoder, encoder = Decoder(1 << 20), hpack.Encoder()
    for _ in range(3):
        assert decoder.decode(encoder.encode(fields)) == fields
        assert decoder.decode(block) == fields


def test_an_end_rides_on_the_last_bytes_of_its_own_stream_unless_something_follows_them():
    client = Peer(Role.CLIENT)
    streams = []
    for _ in range(3):
        carrier = Carrier(client)
        carrier.stream = client.connection.open(carrier, STATUS_200)
        streams.append(carrier.stream)
    client.take()
    connection, output = client.connection, client.connection.output

    def say(stream: Stream, text: bytes) -> None:
        room = connection.reserve(stream)
        assert room
        room[: len(text)] = text
        connection.commit(stream, len(text))

    def frames_out() -> list[tuple[int, int, bytes]]:
        data, found = output.drain(), []
        while data:
            length, flags, stream = int.from_bytes(data[:3], "big"), data[4], int.from_bytes(data[5:9], "big")
            found.append((stream, flags, data[9 : 9 + length]))
            data = data[9 + length :]
        return found

    first, second, third = streams
    say(first, b"a")
    say(second, b"b")
    connection.finish(second)  # the last bytes there are
    connection.finish(first)  # the second's follow its own
    assert frames_out() == [(1, 0, b"a"), (3, 1, b"b"), (1, 1, b"")]
    say(third, b"c")
    assert frames_out() == [(5, 0, b"c")]
    connection.reset(first, Code.CANCEL)
    connection.finish(third)  # its bytes have left, and others lie where they lay
    assert frames_out() == [(1, 0, b"\0\0\0\x08"), (5, 1, b"")]
    assert all(not stream.local_open for stream in streams)
