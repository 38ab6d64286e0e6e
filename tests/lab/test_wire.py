"""The capture reader: what tcpdump wrote is what it says, and garbage is refused."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambient.errors import PeerFault
from ambient.lab.wire import TLS_1_3, read_capture, tls_summary


def tcp4(source: str, sport: int, destination: str, dport: int, sequence: int, payload: bytes) -> bytes:
    tcp = struct.pack("!HHIIBBHHH", sport, dport, sequence, 0, 5 << 4, 0x18, 1000, 0, 0) + payload
    addresses = ipaddress.ip_address(source).packed + ipaddress.ip_address(destination).packed
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0) + addresses + tcp
    return bytes(12) + b"\x08\x00" + ip


def tcp6(source: str, sport: int, destination: str, dport: int, sequence: int, payload: bytes) -> bytes:
    tcp = struct.pack("!HHIIBBHHH", sport, dport, sequence, 0, 5 << 4, 0x18, 1000, 0, 0) + payload
    addresses = ipaddress.ip_address(source).packed + ipaddress.ip_address(destination).packed
    return bytes(12) + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, len(tcp), 6, 64) + addresses + tcp


def capture(*packets: bytes, order: str = "<", link: int = 1) -> bytes:
    head = struct.pack(order + "IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, link)
    return head + b"".join(struct.pack(order + "IIII", 0, 0, len(p), len(p)) + p for p in packets)


def server_hello(version: int) -> bytes:
    extension = struct.pack("!HHH", 43, 2, version)
    rest = struct.pack("!H", 0x0303) + bytes(32) + b"\0" + b"\x13\x02\0" + struct.pack("!H", len(extension)) + extension
    body = b"\x02" + len(rest).to_bytes(3, "big") + rest
    return b"\x16\x03\x03" + len(body).to_bytes(2, "big") + body


def test_segments_of_both_families_and_byte_orders_are_read() -> None:
    packets = (tcp4("10.0.0.1", 1, "10.0.0.2", 80, 5, b"four"), tcp6("fd00::1", 2, "fd00::2", 80, 6, b"six"))
    for order in "<>":
        read = read_capture(capture(*packets, order=order))
        assert [(str(s.source), s.ports, s.payload) for s in read] == [
            ("10.0.0.1", (1, 80), b"four"),
            ("fd00::1", (2, 80), b"six"),
        ]


def test_a_packet_cut_off_at_the_end_is_left_out() -> None:
    whole = capture(tcp4("10.0.0.1", 1, "10.0.0.2", 80, 5, b"x" * 100))
    assert len(read_capture(whole)) == 1
    assert read_capture(whole[:-1]) == ()


def test_what_is_no_capture_is_refused() -> None:
    with pytest.raises(PeerFault, match="not a pcap"):
        read_capture(b"GET / HTTP/1.1\r\n\r\n" * 4)
    with pytest.raises(PeerFault, match="link type 105"):
        read_capture(capture(link=105))


@given(st.binary(max_size=300))
def test_garbage_after_the_header_never_raises(garbage: bytes) -> None:
    tls_summary(read_capture(capture() + garbage), 15008)


def test_tls_records_are_followed_across_reordered_and_repeated_segments() -> None:
    stream = server_hello(TLS_1_3) + b"\x17\x03\x03\x00\x05hello" * 3
    parts = [(n, stream[n : n + 20]) for n in range(0, len(stream), 20)]
    packets = [tcp4("10.0.0.2", 15008, "10.0.0.1", 999, 2**32 - 30 + n & 0xFFFFFFFF, p) for n, p in parts]
    shuffled = [packets[1], packets[0], *packets[2:], packets[0]]
    # the first segment must be the lowest in sequence space, here across the wrap of 2**32
    summary = tls_summary(read_capture(capture(*packets)), 15008)
    assert (summary.versions, summary.records, summary.foreign) == (frozenset({TLS_1_3}), 4, 0)
    assert tls_summary(read_capture(capture(*shuffled)), 15008).foreign == 0


def test_an_older_version_and_plaintext_are_told() -> None:
    old = tls_summary(read_capture(capture(tcp4("10.0.0.2", 15008, "10.0.0.1", 9, 1, server_hello(0x0303)))), 15008)
    assert old.versions == frozenset({0x0303})
    plain = tls_summary(read_capture(capture(tcp4("10.0.0.1", 9, "10.0.0.2", 15008, 1, b"GET / HTTP/1.1\r\n"))), 15008)
    assert plain.foreign == 1
