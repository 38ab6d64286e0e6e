"""What crossed the wire: a reader of tcpdump's capture files, enough to judge a mesh by.

Pure: bytes in, values out. Only classic pcap (either byte order, micro- or nanoseconds) with Ethernet or raw IP
links is read; anything else is a PeerFault. Packets that are not TCP, and truncated ones, are counted and left
out: a capture may end in the middle of a packet while tcpdump is still writing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ambient.errors import PeerFault
from ambient.model.address import IPAddress, unpack_ip

_MAGIC = {
    b"\xd4\xc3\xb2\xa1": "<",
    b"\xa1\xb2\xc3\xd4": ">",
    b"\x4d\x3c\xb2\xa1": "<",
    b"\xa1\xb2\x3c\x4d": ">",
}
_LINK_ETHERNET, _LINK_RAW = 1, 101
_ETHERTYPES = {b"\x08\x00": 4, b"\x86\xdd": 6}
_IP_TCP = 6
_TLS_HANDSHAKE, _TLS_APPLICATION, _TLS_ALERT, _TLS_CHANGE_CIPHER = 22, 23, 21, 20
_SERVER_HELLO = 2
_SUPPORTED_VERSIONS = 43  # RFC 8446, section 4.2.1
TLS_1_3 = 0x0304


@dataclass(frozen=True, slots=True)
class Segment:
    """One TCP segment; ports in host order, ``payload`` as captured."""

    source: IPAddress
    source_port: int
    destination: IPAddress
    destination_port: int
    sequence: int
    payload: bytes

    @property
    def ports(self) -> tuple[int, int]:
        return self.source_port, self.destination_port


def read_capture(raw: bytes) -> tuple[Segment, ...]:
    """All complete TCP segments of a capture file, in order. Raises PeerFault if it is no pcap file."""
    order = _MAGIC.get(raw[:4])
    if order is None or len(raw) < 24:
        raise PeerFault(f"not a pcap capture: it begins with {raw[:4].hex() or 'nothing'}")
    (link,) = struct.unpack_from(order + "I", raw, 20)
    if link not in (_LINK_ETHERNET, _LINK_RAW):
        raise PeerFault(f"a capture of link type {link} cannot be read; capture on an Ethernet interface")
    return tuple(_segments(raw, order, link))


def _segments(raw: bytes, order: str, link: int) -> Iterator[Segment]:
    offset = 24
    while offset + 16 <= len(raw):
        (length,) = struct.unpack_from(order + "I", raw, offset + 8)
        packet = raw[offset + 16 : offset + 16 + length]
        offset += 16 + length
        if len(packet) < length:
            return
        found = _ip(packet, link)
        if found is not None:
            yield found


def _ip(packet: bytes, link: int) -> Segment | None:
    if link == _LINK_ETHERNET:
        version = _ETHERTYPES.get(packet[12:14], 0)
        packet = packet[14:]
    else:
        version = packet[0] >> 4 if packet else 0
    if version == 4 and len(packet) >= 20 and packet[9] == _IP_TCP:
        header = (packet[0] & 15) * 4
        total = int.from_bytes(packet[2:4], "big")
        return _tcp(packet[12:16], packet[16:20], packet[header:total])
    if version == 6 and len(packet) >= 40 and packet[6] == _IP_TCP:
        return _tcp(packet[8:24], packet[24:40], packet[40 : 40 + int.from_bytes(packet[4:6], "big")])
    return None


def _tcp(source: bytes, destination: bytes, segment: bytes) -> Segment | None:
    if len(segment) < 20:
        return None
    source_port, destination_port, sequence = struct.unpack_from("!HHI", segment)
    payload = segment[(segment[12] >> 4) * 4 :]
    return Segment(unpack_ip(source), source_port, unpack_ip(destination), destination_port, sequence, payload)


@dataclass(frozen=True, slots=True)
class TlsSummary:
    """How the connections on one port looked. ``foreign`` are segments at a record's place that are no TLS."""

    versions: frozenset[int] = frozenset()
    """Versions that ServerHellos negotiated; 0x0304 is TLS 1.3."""
    records: int = 0
    foreign: int = 0
    connections: frozenset[tuple[str, int, str, int]] = field(default_factory=frozenset)


def tls_summary(segments: Iterable[Segment], port: int) -> TlsSummary:
    """Walk the TLS records of every connection to ``port`` that the capture saw from its beginning.

    Segments are put in order by sequence number, retransmissions dropped; a stream with a gap is judged up to
    the gap. Whatever stands where a record should begin and is none counts as foreign.
    """
    streams: dict[tuple[str, int, str, int], dict[int, bytes]] = {}
    for segment in segments:
        if port in segment.ports and segment.payload:
            key = (str(segment.source), segment.source_port, str(segment.destination), segment.destination_port)
            held = streams.setdefault(key, {})
            if len(segment.payload) > len(held.get(segment.sequence, b"")):
                held[segment.sequence] = segment.payload
    versions: set[int] = set()
    records = foreign = 0
    for key, held in streams.items():
        stream = _in_order(held)
        good, bad = _records(stream)
        records += len(good)
        foreign += bad
        if key[1] == port:
            versions.update(v for kind, body in good if (v := _server_version(kind, body)) is not None)
    return TlsSummary(frozenset(versions), records, foreign, frozenset(streams))


def _in_order(held: dict[int, bytes]) -> bytes:
    # sequence numbers wrap: the stream begins after the largest hole in the circle of 2**32
    numbers = sorted(held)
    holes = [
        ((number - before) & 0xFFFFFFFF, number)
        for before, number in zip(numbers[-1:] + numbers, numbers, strict=False)
    ]
    first = max(holes)[1]
    out, expected = bytearray(), first
    for sequence in sorted(held, key=lambda s: (s - first) & 0xFFFFFFFF):
        behind = (expected - sequence) & 0xFFFFFFFF
        if behind >= 1 << 31:  # a gap: the capture lost a packet
            break
        fresh = held[sequence][behind:]
        out += fresh
        expected = (expected + len(fresh)) & 0xFFFFFFFF
    return bytes(out)


def _records(stream: bytes) -> tuple[list[tuple[int, bytes]], int]:
    found: list[tuple[int, bytes]] = []
    offset = 0
    while offset + 5 <= len(stream):
        kind, major, length = stream[offset], stream[offset + 1], int.from_bytes(stream[offset + 3 : offset + 5], "big")
        if not _TLS_CHANGE_CIPHER <= kind <= _TLS_APPLICATION or major != 3 or length > 16384 + 256:
            return found, 1
        found.append((kind, stream[offset + 5 : offset + 5 + length]))
        offset += 5 + length
    return found, 0


def _server_version(kind: int, body: bytes) -> int | None:
    """The version a ServerHello settled on: the supported_versions extension, else the legacy field."""
    if kind != _TLS_HANDSHAKE or len(body) < 38 or body[0] != _SERVER_HELLO:
        return None
    version = int.from_bytes(body[4:6], "big")
    offset = 38 + 1 + body[38] + 3 if len(body) > 38 else len(body)  # session id, cipher suite, compression
    offset += 2
    while offset + 4 <= len(body):
        extension, length = struct.unpack_from("!HH", body, offset)
        if extension == _SUPPORTED_VERSIONS and length == 2 and offset + 6 <= len(body):
            return int.from_bytes(body[offset + 4 : offset + 6], "big")
        offset += 4 + length
    return version
