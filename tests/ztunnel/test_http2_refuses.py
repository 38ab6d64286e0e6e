"""Malformed and flooding HTTP/2 peers: the RFC's error code, one GOAWAY, bounded memory."""

from __future__ import annotations

import struct
import tracemalloc

import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ztunnel.http2_peers import Carrier, Peer
from ztunnel.core import frames
from ztunnel.core.frames import Code, frame
from ztunnel.core.headers import encode
from ztunnel.core.http2 import Limits, Role

CONNECT = encode([(b":method", b"CONNECT"), (b":authority", b"10.0.0.1:80")])
HELLO = frames.PREFACE + frames.settings({}) + frames.SETTINGS_ACK
HEAD = frames.END_HEADERS
END = frames.END_STREAM


def parse(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """Frames of our output as (kind, flags, stream, payload)."""
    out = []
    while data:
        word, flags, stream = frames.HEADER.unpack_from(data)
        out.append((word & 255, flags, stream, data[9 : 9 + (word >> 8)]))
        data = data[9 + (word >> 8) :]
    return out


def server() -> Peer:
    peer = Peer(Role.SERVER)
    peer.feed(HELLO)
    peer.take()
    return peer


def client() -> tuple[Peer, Carrier]:
    peer = Peer(Role.CLIENT)
    peer.feed(frames.settings({}) + frames.SETTINGS_ACK)
    carrier = Carrier(peer)
    carrier.stream = peer.connection.open(carrier, CONNECT)
    peer.take()
    return peer, carrier


def open_frame(stream: int, block: bytes = CONNECT, flags: int = HEAD) -> bytes:
    return frame(frames.HEADERS, flags, stream, block)


def goaways(data: bytes) -> list[int]:
    return [frames.word(payload, 4) for kind, _, _, payload in parse(data) if kind == frames.GOAWAY]


def resets(data: bytes) -> dict[int, int]:
    return {stream: frames.word(payload) for kind, _, stream, payload in parse(data) if kind == frames.RST_STREAM}


FATAL = {
    "a request of HTTP/1": (b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", None),
    "a frame before SETTINGS": (frames.PREFACE + frames.ping(b"x" * 8, ack=False), Code.PROTOCOL_ERROR),
    "an acknowledgement before SETTINGS": (frames.PREFACE + frames.SETTINGS_ACK, Code.PROTOCOL_ERROR),
    "an oversized frame": (HELLO + struct.pack(">IBI", (1 << 20) + 1 << 8, 0, 1), Code.FRAME_SIZE_ERROR),
    "an oversized frame of an unknown type": (HELLO + b"\xff\xff\xff\x77\0\0\0\0\1", Code.FRAME_SIZE_ERROR),
    "DATA on stream 0": (HELLO + frame(0, 0, 0, b"x"), Code.PROTOCOL_ERROR),
    "DATA on an idle stream": (HELLO + frame(0, 0, 1, b"x"), Code.PROTOCOL_ERROR),
    "DATA on an even stream": (HELLO + frame(0, 0, 2, b"x"), Code.PROTOCOL_ERROR),
    "padding as long as its DATA": (HELLO + open_frame(1) + frame(0, frames.PADDED, 1, b"\2x"), Code.PROTOCOL_ERROR),
    "padded DATA without a byte": (HELLO + open_frame(1) + frame(0, frames.PADDED, 1), Code.PROTOCOL_ERROR),
    "HEADERS on stream 0": (HELLO + open_frame(0), Code.PROTOCOL_ERROR),
    "HEADERS on an even stream": (HELLO + open_frame(2), Code.PROTOCOL_ERROR),
    "a stream identifier that goes back": (HELLO + open_frame(5) + open_frame(3), Code.PROTOCOL_ERROR),
    "HEADERS of a stream the peer reset": (
        HELLO + open_frame(1) + frames.rst_stream(1, 8) + open_frame(1),
        Code.STREAM_CLOSED,
    ),
    "padding longer than HEADERS": (HELLO + open_frame(1, b"\xff", HEAD | frames.PADDED), Code.PROTOCOL_ERROR),
    "HEADERS with PRIORITY but too short": (
        HELLO + open_frame(1, b"abc", HEAD | frames.PRIORITY_FLAG),
        Code.PROTOCOL_ERROR,
    ),
    "an HPACK index out of range": (HELLO + open_frame(1, b"\xfe"), Code.COMPRESSION_ERROR),
    "an HPACK string cut short": (HELLO + open_frame(1, b"\x00\x05ab"), Code.COMPRESSION_ERROR),
    "an HPACK Huffman string that is not": (
        HELLO + open_frame(1, b"\x40\x84\xff\xff\xff\xff\x00"),
        Code.COMPRESSION_ERROR,
    ),
    "an HPACK integer without end": (HELLO + open_frame(1, b"\x0f" + b"\xff" * 20), Code.COMPRESSION_ERROR),
    "a header block interrupted by DATA": (
        HELLO + open_frame(1, CONNECT, 0) + frame(0, 0, 1, b""),
        Code.PROTOCOL_ERROR,
    ),
    "a header block interrupted by another stream": (
        HELLO + open_frame(1, CONNECT, 0) + frame(9, HEAD, 3, b""),
        Code.PROTOCOL_ERROR,
    ),
    "CONTINUATION without HEADERS": (HELLO + frame(9, HEAD, 1, b""), Code.PROTOCOL_ERROR),
    "CONTINUATION after END_HEADERS": (HELLO + open_frame(1) + frame(9, HEAD, 1, b""), Code.PROTOCOL_ERROR),
    "PRIORITY on stream 0": (HELLO + frame(2, 0, 0, b"\0\0\0\0\0"), Code.PROTOCOL_ERROR),
    "PRIORITY of 4 bytes": (HELLO + frame(2, 0, 1, b"\0\0\0\0"), Code.FRAME_SIZE_ERROR),
    "RST_STREAM of 3 bytes": (HELLO + open_frame(1) + frame(3, 0, 1, b"\0\0\0"), Code.FRAME_SIZE_ERROR),
    "RST_STREAM on stream 0": (HELLO + frames.rst_stream(0, 8), Code.PROTOCOL_ERROR),
    "RST_STREAM on an idle stream": (HELLO + frames.rst_stream(1, 8), Code.PROTOCOL_ERROR),
    "SETTINGS on a stream": (HELLO + frame(4, 0, 1, b""), Code.PROTOCOL_ERROR),
    "SETTINGS of 5 bytes": (HELLO + frame(4, 0, 0, b"12345"), Code.FRAME_SIZE_ERROR),
    "an acknowledgement with parameters": (HELLO + frame(4, 1, 0, b"\0\3\0\0\0\1"), Code.FRAME_SIZE_ERROR),
    "ENABLE_PUSH of 2": (HELLO + frames.settings({2: 2}), Code.PROTOCOL_ERROR),
    "INITIAL_WINDOW_SIZE too large": (HELLO + frames.settings({4: 2**31}), Code.FLOW_CONTROL_ERROR),
    "MAX_FRAME_SIZE too small": (HELLO + frames.settings({5: 16383}), Code.PROTOCOL_ERROR),
    "MAX_FRAME_SIZE too large": (HELLO + frames.settings({5: 2**24}), Code.PROTOCOL_ERROR),
    "hundreds of parameters": (HELLO + frame(4, 0, 0, b"\0\x77\0\0\0\1" * 500), Code.ENHANCE_YOUR_CALM),
    "PUSH_PROMISE": (HELLO + open_frame(1) + frame(5, HEAD, 1, b"\0\0\0\2" + CONNECT), Code.PROTOCOL_ERROR),
    "PING of 6 bytes": (HELLO + frame(6, 0, 0, b"123456"), Code.FRAME_SIZE_ERROR),
    "PING on a stream": (HELLO + frame(6, 0, 1, b"12345678"), Code.PROTOCOL_ERROR),
    "GOAWAY of 4 bytes": (HELLO + frame(7, 0, 0, b"1234"), Code.FRAME_SIZE_ERROR),
    "GOAWAY on a stream": (HELLO + frame(7, 0, 1, b"12345678"), Code.PROTOCOL_ERROR),
    "GOAWAY with a megabyte of text": (HELLO + frame(7, 0, 0, b"12345678" * 4096), Code.ENHANCE_YOUR_CALM),
    "WINDOW_UPDATE of 3 bytes": (HELLO + frame(8, 0, 0, b"123"), Code.FRAME_SIZE_ERROR),
    "WINDOW_UPDATE of nothing on the connection": (HELLO + frames.window_update(0, 0), Code.PROTOCOL_ERROR),
    "WINDOW_UPDATE on an idle stream": (HELLO + frames.window_update(1, 1), Code.PROTOCOL_ERROR),
    "a connection window that overflows": (HELLO + frames.window_update(0, 2**31 - 1), Code.FLOW_CONTROL_ERROR),
    "a stream window that overflows by SETTINGS": (
        HELLO + open_frame(1) + frames.window_update(1, 2**31 - 1 - 65535) + frames.settings({4: 2**31 - 1}),
        Code.FLOW_CONTROL_ERROR,
    ),
    "a header block of 100 KB": (HELLO + open_frame(1, b"\0" * 100_000), Code.ENHANCE_YOUR_CALM),
    "a small block that expands": (
        HELLO + open_frame(1, b"\x40\x01a\x7f\xa1\x1e" + b"x" * 4000 + b"\xbe" * 100),
        Code.ENHANCE_YOUR_CALM,
    ),
    "a flood of CONTINUATION": (
        HELLO + open_frame(1, b"", 0) + frame(9, 0, 1, b"") * 1000,
        Code.ENHANCE_YOUR_CALM,
    ),
    "CONTINUATION without end": (
        HELLO + open_frame(1, b"", 0) + frame(9, 0, 1, b"\0" * 16000) * 50,
        Code.ENHANCE_YOUR_CALM,
    ),
    "a flood of PING": (HELLO + frames.ping(b"12345678", ack=False) * 500, Code.ENHANCE_YOUR_CALM),
    "a flood of SETTINGS": (HELLO + frames.settings({}) * 100, Code.ENHANCE_YOUR_CALM),
    "a flood of acknowledgements": (HELLO + frames.SETTINGS_ACK * 5000, Code.ENHANCE_YOUR_CALM),
    "a flood of empty DATA": (HELLO + open_frame(1) + frame(0, 0, 1) * 5000, Code.ENHANCE_YOUR_CALM),
    "a flood of PRIORITY": (HELLO + frame(2, 0, 1, b"\0\0\0\3\1") * 5000, Code.ENHANCE_YOUR_CALM),
    "a flood of unknown frames": (HELLO + frame(77, 0, 1, b"x") * 5000, Code.ENHANCE_YOUR_CALM),
}


@pytest.mark.parametrize("name", FATAL)
def test_a_connection_ends_with_goaway_and_the_right_code_at(name: str):
    data, code = FATAL[name]
    for step in (len(data), 1000, 1):
        peer = Peer(Role.SERVER)
        for at in range(0, len(data), step):
            peer.feed(data[at : at + step])
        assert peer.connection.closed
        assert goaways(peer.take()) == [code if code is not None else Code.PROTOCOL_ERROR]
        assert peer.code == (code if code is not None else Code.PROTOCOL_ERROR)
        peer.feed(HELLO)
        assert peer.take() == b""


def test_streams_that_are_reset_before_an_answer_are_counted():
    peer = Peer(Role.SERVER, accept=False)
    peer.feed(HELLO)
    for stream in range(1, 2001, 2):
        peer.feed(open_frame(stream) + frames.rst_stream(stream, Code.CANCEL))
    assert peer.code is Code.ENHANCE_YOUR_CALM
    assert len(peer.requests) < 250


def test_streams_that_were_answered_may_be_reset_at_any_rate():
    peer = server()
    for stream in range(1, 10001, 2):
        peer.feed(open_frame(stream) + frames.rst_stream(stream, Code.CANCEL))
    assert peer.code is None and not peer.connection.streams


def test_mistakes_on_streams_are_counted():
    peer = server()
    bad = encode([(b":method", b"CONNECT")])
    for stream in range(1, 2001, 2):
        peer.feed(open_frame(stream, bad))
    assert peer.code is Code.ENHANCE_YOUR_CALM and not peer.requests


MALFORMED = {
    "an upper-case name": [(b":method", b"CONNECT"), (b":authority", b"a:1"), (b"X-A", b"b")],
    "an empty name": [(b":method", b"CONNECT"), (b":authority", b"a:1"), (b"", b"b")],
    "connection": [(b":method", b"CONNECT"), (b":authority", b"a:1"), (b"connection", b"close")],
    "te: gzip": [(b":method", b"CONNECT"), (b":authority", b"a:1"), (b"te", b"gzip")],
    "a line feed": [(b":method", b"CONNECT"), (b":authority", b"a:1"), (b"x", b"a\nb")],
    "a space before a value": [(b":method", b"CONNECT"), (b":authority", b"a:1"), (b"x", b" b")],
    "an unknown pseudo-header": [(b":method", b"CONNECT"), (b":authority", b"a:1"), (b":x", b"1")],
    ":status": [(b":method", b"CONNECT"), (b":authority", b"a:1"), (b":status", b"200")],
    "a pseudo-header twice": [(b":method", b"CONNECT"), (b":method", b"CONNECT"), (b":authority", b"a:1")],
    "a pseudo-header after a field": [(b":method", b"CONNECT"), (b"x", b"y"), (b":authority", b"a:1")],
    "no method": [(b":authority", b"a:1")],
    "CONNECT without authority": [(b":method", b"CONNECT")],
    "CONNECT with a path": [(b":method", b"CONNECT"), (b":authority", b"a:1"), (b":path", b"/")],
    "CONNECT with a scheme": [(b":method", b"CONNECT"), (b":authority", b"a:1"), (b":scheme", b"https")],
    "GET without a path": [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"a:1")],
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_resets_its_stream_only(name: str):
    peer = server()
    peer.feed(open_frame(1) + open_frame(3, encode(MALFORMED[name])) + frame(0, 0, 1, b"still here"))
    out = peer.take()
    assert resets(out) == {3: Code.PROTOCOL_ERROR} and not goaways(out)
    assert peer.carriers[0].received == b"still here"


STREAM_FAULTS = {
    "a window update of nothing": (frames.window_update(1, 0), Code.PROTOCOL_ERROR),
    "a window that overflows": (frames.window_update(1, 2**31 - 1), Code.FLOW_CONTROL_ERROR),
    "HEADERS in the middle": (open_frame(1), Code.PROTOCOL_ERROR),
    "trailers with a pseudo-header": (open_frame(1, CONNECT, HEAD | END), Code.PROTOCOL_ERROR),
    "a dependency on itself": (frame(2, 0, 1, b"\0\0\0\1\x10"), Code.PROTOCOL_ERROR),
    "DATA after the end": (frame(0, END, 1) + frame(0, 0, 1, b"x"), Code.STREAM_CLOSED),
    "HEADERS after the end": (frame(0, END, 1) + open_frame(1), Code.STREAM_CLOSED),
}


@pytest.mark.parametrize("name", STREAM_FAULTS)
def test_a_fault_of_one_stream_leaves_its_neighbour_alone(name: str):
    data, code = STREAM_FAULTS[name]
    peer = server()
    peer.feed(open_frame(1) + open_frame(3))
    peer.carriers[0].echo = False  # keeps our side of stream 1 open
    peer.feed(data + frame(0, 0, 3, b"neighbour"))
    out = peer.take()
    assert resets(out) == {1: code} and not goaways(out)
    assert peer.carriers[1].received == b"neighbour"


def test_a_stream_that_exceeds_its_credit_is_reset_and_the_connection_s_credit_returned():
    peer = Peer(Role.SERVER, Limits(stream_window=10_000, connection_window=100_000))
    peer.feed(HELLO + open_frame(1))
    peer.take()
    peer.feed(frame(0, 0, 1, b"x" * 10_001))
    assert resets(peer.take()) == {1: Code.FLOW_CONTROL_ERROR}
    for stream in range(3, 40, 2):  # far more than the connection's window in total
        peer.feed(open_frame(stream) + frame(0, 0, stream, b"y" * 10_000))
    assert peer.code is None


def test_a_connection_that_exceeds_its_credit_ends():
    peer = Peer(Role.SERVER, Limits(stream_window=100_000, connection_window=65535), accept=False)
    peer.feed(HELLO + open_frame(1))
    peer.carriers[0].stream_data = lambda data: None  # type: ignore[method-assign]
    peer.feed(frame(0, 0, 1, b"x" * 16000) * 5)
    assert goaways(peer.take()) == [Code.FLOW_CONTROL_ERROR]


def test_more_streams_than_advertised_are_refused_and_the_rest_go_on():
    peer = Peer(Role.SERVER, Limits(streams=3))
    peer.feed(HELLO + b"".join(open_frame(stream) for stream in (1, 3, 5, 7)))
    assert resets(peer.take()) == {7: Code.REFUSED_STREAM}
    peer.feed(frame(0, END, 1) + open_frame(9))
    assert len(peer.requests) == 4 and peer.code is None


def test_frames_on_a_stream_we_reset_are_ignored():
    peer = server()
    peer.feed(open_frame(1) + open_frame(3))
    stream = peer.carriers[0].stream
    assert stream is not None
    peer.connection.reset(stream, Code.CANCEL)
    peer.take()
    peer.feed(frame(0, 0, 1, b"late") + frames.window_update(1, 5) + open_frame(1, CONNECT, HEAD | END))
    peer.feed(frames.rst_stream(1, 8) + frame(0, 0, 3, b"x"))
    out = peer.take()
    assert not goaways(out) and not resets(out) and peer.carriers[1].received == b"x"


def test_a_server_that_sends_data_before_its_response_loses_the_stream():
    peer, carrier = client()
    peer.feed(frame(0, 0, 1, b"early"))
    assert resets(peer.take()) == {1: Code.PROTOCOL_ERROR} and carrier.reset_code == Code.PROTOCOL_ERROR
    assert carrier.received == b""


@pytest.mark.parametrize(
    "fields",
    [[(b"x", b"y")], [(b":status", b"20")], [(b":status", b"200"), (b":path", b"/")], [(b":status", b"2x0")]],
)
def test_a_malformed_response_loses_the_stream(fields: list[tuple[bytes, bytes]]):
    peer, carrier = client()
    peer.feed(open_frame(1, encode(fields)))
    assert resets(peer.take()) == {1: Code.PROTOCOL_ERROR} and carrier.fields is None


@pytest.mark.parametrize(
    "data",
    [frame(5, HEAD, 1, b"\0\0\0\2\x88"), open_frame(2, b"\x88"), open_frame(3, b"\x88"), frames.settings({2: 1})],
)
def test_a_server_may_not_push_nor_open_streams(data: bytes):
    peer, carrier = client()
    peer.feed(data)
    assert goaways(peer.take()) == [Code.PROTOCOL_ERROR] and carrier.reset_code is not None


def test_streams_above_a_goaway_are_refused_and_those_below_go_on():
    peer, first = client()
    second = Carrier(peer)
    second.stream = peer.connection.open(second, CONNECT)
    peer.feed(open_frame(1, b"\x88") + frames.goaway(1, 0) + frame(0, 0, 1, b"on"))
    assert second.reset_code == Code.REFUSED_STREAM and first.reset_code is None and first.received == b"on"
    assert peer.away == 1 and not peer.connection.can_open


def test_settings_that_are_never_acknowledged_end_the_connection():
    peer = Peer(Role.SERVER)
    peer.feed(frames.PREFACE + frames.settings({}))
    peer.connection.tick(9.0)
    assert not peer.connection.closed
    peer.connection.tick(10.5)
    assert goaways(peer.take()) == [Code.SETTINGS_TIMEOUT]


def test_a_silent_peer_is_asked_and_then_given_up():
    peer = server()
    peer.connection.tick(10.0)
    assert [kind for kind, *_ in parse(peer.take())] == [frames.PING]
    peer.now = 15.0
    peer.feed(frames.ping(b"ambient\0", ack=True))
    peer.connection.tick(24.0)
    assert not peer.take()
    peer.connection.tick(25.0)
    assert [kind for kind, *_ in parse(peer.take())] == [frames.PING]
    peer.connection.tick(45.5)
    assert peer.connection.closed


def test_a_draining_server_takes_streams_until_it_names_the_last_one():
    peer = server()
    peer.feed(open_frame(1))
    peer.connection.drain(0.0)
    first = parse(peer.take())[-1]
    assert first[0] == frames.GOAWAY and frames.word(first[3]) == frames.STREAM_ID_MAX
    peer.feed(open_frame(3))
    peer.connection.tick(1.0)
    last = parse(peer.take())[-1]
    assert last[0] == frames.GOAWAY and frames.word(last[3]) == 3
    peer.feed(open_frame(5) + frame(0, 0, 3, b"goes on"))
    assert resets(peer.take()) == {5: Code.REFUSED_STREAM}
    assert peer.carriers[1].received == b"goes on"


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=3000), pieces=st.integers(1, 500), after_hello=st.booleans(), role=st.sampled_from(Role))
def test_garbage_never_raises_and_never_leaves_a_closed_connection_talking(
    data: bytes, pieces: int, after_hello: bool, role: Role
):
    peer = Peer(role)
    hello = (HELLO if role is Role.SERVER else frames.settings({})) if after_hello else b""
    data = hello + data
    for at in range(0, len(data), pieces):
        peer.feed(data[at : at + pieces])
    assert (peer.connection.fault is not None) == peer.connection.closed
    assert len(goaways(peer.take()[24 if role is Role.CLIENT else 0 :])) == int(peer.connection.closed)


frame_soup = st.lists(
    st.builds(
        frame,
        st.integers(0, 11),
        st.sampled_from([0, 1, 4, 5, 8, 9, 0x20, 0x2D]),
        st.integers(0, 9),
        st.one_of(st.binary(max_size=60), st.just(CONNECT), st.just(b"\x88"), st.just(b"\0\0\0\1")),
    ),
    max_size=40,
)


@settings(max_examples=400, deadline=None)
@given(soup=frame_soup, role=st.sampled_from(Role))
def test_any_soup_of_frames_keeps_owners_consistent(soup: list[bytes], role: Role):
    if role is Role.CLIENT:
        peer, _ = client()
    else:
        peer = server()
    for part in soup:
        peer.feed(part)
    assert len(peer.connection.streams) <= 201
    for carrier in peer.carriers:
        assert carrier.stream is not None
        if peer.connection.closed:
            assert carrier.stream.dead


def test_floods_leave_little_memory_behind():
    encoder = hpack.Encoder()
    block = encoder.encode([(":method", "CONNECT"), (":authority", "a:1"), ("x", "y" * 300)])
    tracemalloc.start()
    peer = Peer(Role.SERVER)
    peer.feed(HELLO)
    before = tracemalloc.get_traced_memory()[0]
    for stream in range(1, 1001, 2):
        if peer.connection.closed:
            peer = Peer(Role.SERVER)
            peer.feed(HELLO + open_frame(1))
            continue
        peer.connection.receive(memoryview(open_frame(stream, block) + frames.rst_stream(stream, 8)), 0.0)
        peer.connection.receive(memoryview(frames.ping(b"12345678", ack=False)), float(stream))
        peer.requests.clear()
        peer.carriers.clear()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 1024 * 1024
