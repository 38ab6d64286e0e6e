"""CONNECT requests built and read; what arrives from outside may be anything."""

from __future__ import annotations

import hpack
from hypothesis import given, settings
from hypothesis import strategies as st

from ztunnel.core import hbone
from ztunnel.core.headers import Decoder, HeaderFault, check_request, decode_plain, encode

LOCAL = "10.0.0.2"


def read(fields: list[tuple[bytes, bytes]], local: str = LOCAL) -> hbone.Connect | hbone.Refused:
    return hbone.read_connect(fields, local, hbone.Authorities())


def connect(authority: bytes, *more: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    return [(b":method", b"CONNECT"), (b":authority", authority), *more]


def test_what_one_ztunnel_builds_another_reads_and_so_does_hpack():
    for ip, client in ((LOCAL, "10.0.0.1:40000"), ("fd00::2", "[fd00::1]:40000")):
        authority = f"[{ip}]:80" if ":" in ip else f"{ip}:80"
        requests, decoder = hbone.Requests(), Decoder(65536)
        for trace in (0, 1, 2**192 - 1):
            block = requests.block(authority, "k8s.pod.name=a,service.name=s", client, trace)
            fields = decoder.decode(block)
            assert decoder.check_request(fields) == "" == check_request(fields)
            assert [(bytes(a), bytes(b)) for a, b in hpack.Decoder().decode(block, raw=True)] == fields
            got = read(fields, ip)
            assert isinstance(got, hbone.Connect)
            assert (got.ip, got.port, got.client_port) == (ip, 80, 40000)
            assert got.client_ip == client.rpartition(":")[0].strip("[]")
            assert got.traceparent == f"00-{trace >> 64:032x}-{trace & (2**64 - 1):016x}-01"


def test_only_connect_to_the_tunnel_s_own_address_and_no_port_of_the_mesh_goes_on():
    assert isinstance(read(connect(b"10.0.0.2:80")), hbone.Connect)
    assert isinstance(read(connect(b"[::ffff:10.0.0.2]:80")), hbone.Connect)
    bad = (b"10.0.0.3:80", b"10.0.0.2", b"10.0.0.2:0", b"10.0.0.2:65536", b"10.0.0.2:15008", b"a.b:80", b"\xff:80")
    for authority in bad:
        got = read(connect(authority))
        assert isinstance(got, hbone.Refused) and got.status == 400, authority
    get = [(b":method", b"GET"), (b":scheme", b"https"), (b":path", b"/"), (b":authority", b"10.0.0.2:80")]
    assert isinstance(read(get), hbone.Refused)
    assert isinstance(read(connect(b"10.0.0.2:80", (b":protocol", b"websocket"))), hbone.Refused)


def test_answers_are_decoded_by_anybody():
    for status in (200, 400, 401, 503):
        fields = hpack.Decoder().decode(hbone.response(status), raw=True)
        assert hbone.read_status([(bytes(a), bytes(b)) for a, b in fields]) == status
    assert hbone.response(200) == b"\x88"


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_forwarded_is_read_or_ignored(value: bytes):
    ip, port = hbone.read_forwarded(value)
    assert (ip == "") == (port == 0) and 0 <= port < 65536


@given(st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_authority_is_read_or_refused(authority: bytes):
    got = read(connect(authority))
    assert isinstance(got, hbone.Refused) or (got.ip == LOCAL and got.port)


PREFIX = encode(connect(b"10.0.0.2:80", (b"baggage", b"a=b")))
OWN_TAIL = st.builds(
    lambda length, client, trace, end: bytes([length]) + client + b"\x00\x0btraceparent\x37" + trace + end,
    st.sampled_from([15, 15, 15, 14, 16, 127]),
    st.sampled_from([b'for="1.2.3.4:5"', b'for="[::1]:443"', b'for="1.2.3.4\n5"', b"for=1.2.3.4:567"]),
    st.sampled_from([b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01", b"a" * 54, b"a" * 54 + b"\r", b"a" * 54 + b" "]),
    st.sampled_from([b"", b"", b"\x00\x01x\x01y", b"\n"]),
)
blocks = st.one_of(
    st.binary(max_size=120),
    st.builds(lambda prefix, tail: prefix + b"\x00\x09forwarded" + tail, st.just(PREFIX), OWN_TAIL),
    st.builds(
        lambda prefix, cut, tail: prefix[:cut] + b"\x00\x09forwarded" + tail,
        st.sampled_from([PREFIX, PREFIX + b"\x00\x01x\x20", encode([(b":method", b"GET")]), b"\x00\x01a\x0d"]),
        st.integers(0, len(PREFIX) + 4),
        st.one_of(st.binary(max_size=40), st.sampled_from([b"\x03abc", b"\x03abc\x00\x0btraceparent\x01x", b"\x01\n"])),
    ),
)


@given(st.lists(blocks, max_size=6))
@settings(max_examples=400, deadline=None)
def test_what_is_kept_of_earlier_requests_never_changes_how_a_block_is_read(soup: list[bytes]):
    kept = Decoder(65536)
    for block in soup:
        fresh = Decoder(65536)
        results = []
        for decoder in (kept, fresh):
            try:
                fields = decoder.decode(block)
                results.append((fields, decoder.check_request(fields) == ""))
            except HeaderFault:
                results.append(None)
        if results[1] is not None and all(byte < 0x20 or byte >= 0x80 for byte in block[:1]):
            assert results[0] == results[1]
            assert results[1][1] == (check_request(results[1][0]) == "")
            assert decode_plain(block) in (None, results[1][0])


def test_what_is_kept_of_a_peer_s_headers_is_small():
    authorities, decoder = hbone.Authorities(), Decoder(65536)
    for number in range(100):
        assert authorities.parse(b"10.0.0.1:80" + b"0" * 60_000 + b"%d" % number) is None
        fields = [(b":method", b"CONNECT"), (b":authority", b"10.0.0.1:80"), (b"baggage", b"%d" % number * 15_000)]
        assert decoder.decode(encode([*fields, (b"forwarded", b"for=1")]))[:3] == fields
    assert sum(map(len, authorities._known)) < 10_000
    assert sum(map(len, decoder._prefixes)) < 10_000
