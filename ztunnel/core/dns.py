"""DNS messages: a strict, bounded parser of what arrives and a builder of answers (RFC 1035, 6891, 2308).

Only what a stub resolver's proxy needs: one question, A and AAAA answers, the EDNS OPT record. Anything that
is not a well-formed query of this kind is refused with the response code to send back.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ambient.model.address import IPAddress

MESSAGE_BYTES_MAX: Final = 65535
NAME_BYTES_MAX: Final = 255
LABEL_BYTES_MAX: Final = 63
POINTERS_MAX: Final = 16
RECORDS_MAX: Final = 64
"""Records a query may carry beside its question."""
UDP_BYTES_PLAIN: Final = 512
UDP_BYTES_MAX: Final = 4096
UDP_BYTES_OURS: Final = 1232
"""The payload size we advertise: no fragments on any sane path."""
TTL_S: Final = 30

CLASS_IN: Final = 1
TYPE_A: Final = 1
TYPE_CNAME: Final = 5
TYPE_AAAA: Final = 28
TYPE_OPT: Final = 41

_HEADER = struct.Struct(">HHHHHH")
_QR, _AA, _TC, _RD, _RA = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080


class Code(enum.IntEnum):
    """Response codes; BADVERS needs an OPT record."""

    NOERROR = 0
    FORMERR = 1
    SERVFAIL = 2
    NXDOMAIN = 3
    NOTIMP = 4
    REFUSED = 5
    BADVERS = 16


class DnsFault(Exception):
    """A message that is no query for us. ``code`` is what to answer; None: answer nothing."""

    def __init__(self, message: str, code: Code | None) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Question:
    """``name`` is lower-case with no final dot; the root is empty. Labels keep their bytes as Latin-1."""

    name: str
    kind: int
    klass: int = CLASS_IN


@dataclass(frozen=True, slots=True)
class Query:
    number: int
    question: Question
    raw_question: bytes
    """As it was sent, to be sent back: some clients check the case of the letters (0x20)."""
    recursion_desired: bool
    edns: bool = False
    edns_version: int = 0
    udp_bytes_max: int = UDP_BYTES_PLAIN


def parse_query(raw: bytes) -> Query:
    """Raises DnsFault."""
    if not 12 <= len(raw) <= MESSAGE_BYTES_MAX:
        raise DnsFault(f"{len(raw)} bytes are no DNS message", None)
    number, flags, questions, answers, authorities, additional = _HEADER.unpack_from(raw)
    if flags & _QR:
        raise DnsFault("a response where a query belongs", None)
    if flags >> 11 & 0xF:
        raise DnsFault(f"opcode {flags >> 11 & 0xF}", Code.NOTIMP)
    if questions != 1:
        raise DnsFault(f"{questions} questions", Code.FORMERR)
    if answers + authorities + additional > RECORDS_MAX:
        raise DnsFault(f"{answers + authorities + additional} records in a query", Code.FORMERR)
    if flags & _TC or answers:
        raise DnsFault("a query with answers, or a truncated one", Code.FORMERR)
    question, offset = _parse_question(raw)
    edns, version, size = False, 0, UDP_BYTES_PLAIN
    raw_question = raw[12:offset]
    for index in range(authorities + additional):
        name, offset = _parse_name(raw, offset)
        if offset + 10 > len(raw):
            raise DnsFault("a record ends early", Code.FORMERR)
        kind, klass, ttl, length = struct.unpack_from(">HHIH", raw, offset)
        offset += 10 + length
        if offset > len(raw):
            raise DnsFault("a record ends early", Code.FORMERR)
        if kind == TYPE_OPT:
            if edns or name or index < authorities:
                raise DnsFault("a second or misplaced OPT record", Code.FORMERR)
            edns, version = True, ttl >> 16 & 0xFF
            size = min(max(klass, UDP_BYTES_PLAIN), UDP_BYTES_MAX)
    if offset != len(raw):
        raise DnsFault(f"{len(raw) - offset} bytes after the message", Code.FORMERR)
    return Query(number, question, raw_question, bool(flags & _RD), edns, version, size)


def _parse_question(raw: bytes) -> tuple[Question, int]:
    name, offset = _parse_name(raw, 12, pointers=False)
    if offset + 4 > len(raw):
        raise DnsFault("the question ends early", Code.FORMERR)
    kind, klass = struct.unpack_from(">HH", raw, offset)
    return Question(name, kind, klass), offset + 4


def _parse_name(raw: bytes, offset: int, *, pointers: bool = True) -> tuple[str, int]:
    """A name and the offset behind it. Pointers must go backwards, each further than the one before."""
    labels: list[str] = []
    size, end, followed, lowest = 1, -1, 0, offset
    while True:
        if offset >= len(raw):
            raise DnsFault("a name ends early", Code.FORMERR)
        length = raw[offset]
        if length == 0:
            offset += 1
            break
        if length & 0xC0 == 0xC0:
            if not pointers or offset + 2 > len(raw):
                raise DnsFault("a compression pointer where none may be", Code.FORMERR)
            target = (length & 0x3F) << 8 | raw[offset + 1]
            end = end if end >= 0 else offset + 2
            followed += 1
            if followed > POINTERS_MAX or not 12 <= target < lowest:
                raise DnsFault("a loop of compression pointers", Code.FORMERR)
            offset = lowest = target
            continue
        if length & 0xC0:
            raise DnsFault("a label of an unknown type", Code.FORMERR)
        size += length + 1
        if size > NAME_BYTES_MAX or offset + 1 + length > len(raw):
            raise DnsFault("a name is too long or ends early", Code.FORMERR)
        label = raw[offset + 1 : offset + 1 + length]
        if b"." in label:
            # would be read as two labels: such a name is nobody's, and must not be taken for another
            label = label.replace(b".", b"\\.")
        labels.append(label.decode("latin-1"))
        offset += 1 + length
    return _lower(".".join(labels)), end if end >= 0 else offset


def _lower(text: str) -> str:
    """ASCII letters only, as DNS compares (RFC 4343)."""
    return "".join(chr(ord(c) | 0x20) if "A" <= c <= "Z" else c for c in text)


def encode_name(name: str) -> bytes:
    """The wire form of a name as `Question.name` has it. Raises ValueError if it has none."""
    out = bytearray()
    for label in name.split(".") if name else ():
        raw = label.encode("latin-1")
        if not 0 < len(raw) <= LABEL_BYTES_MAX:
            raise ValueError(f"{name!r} is not a DNS name")
        out += bytes([len(raw)]) + raw
    out.append(0)
    if len(out) > NAME_BYTES_MAX:
        raise ValueError(f"{name!r} is not a DNS name")
    return bytes(out)


def build_query(number: int, question: Question, *, udp_bytes_max: int = 0) -> bytes:
    """A recursive query; with an OPT record if ``udp_bytes_max`` is given. Raises ValueError for a bad name."""
    opt = struct.pack(">BHHIH", 0, TYPE_OPT, udp_bytes_max, 0, 0) if udp_bytes_max else b""
    header = _HEADER.pack(number, _RD, 1, 0, 0, 1 if opt else 0)
    return header + encode_name(question.name) + struct.pack(">HH", question.kind, question.klass) + opt


def build_answer(
    query: Query,
    addresses: Sequence[IPAddress] = (),
    *,
    alias: str = "",
    code: Code = Code.NOERROR,
    bytes_max: int = MESSAGE_BYTES_MAX,
    ttl_s: int = TTL_S,
) -> bytes:
    """Answer with addresses of the question's family, behind a CNAME to ``alias`` if one is given.

    What does not fit ``bytes_max`` is cut and the answer marked truncated, so that the client asks again by TCP.
    """
    opt = b""
    if query.edns:
        opt = struct.pack(">BHHIH", 0, TYPE_OPT, UDP_BYTES_OURS, (code >> 4) << 24, 0)
    flags = _QR | _AA | _RA | (_RD if query.recursion_desired else 0) | (code & 0xF)
    body = bytearray(query.raw_question)
    room = bytes_max - 12 - len(body) - len(opt)
    owner = struct.pack(">H", 0xC000 | 12)
    count = 0
    truncated = False
    records: list[bytes] = []
    if alias:
        target = encode_name(alias)
        records.append(owner + struct.pack(">HHIH", TYPE_CNAME, CLASS_IN, ttl_s, len(target)) + target)
        # the target begins behind the record's name (2) and fixed part (10)
        owner = struct.pack(">H", 0xC000 | (12 + len(body) + 12))
    for address in addresses:
        kind = TYPE_A if address.version == 4 else TYPE_AAAA
        packed = address.packed
        records.append(owner + struct.pack(">HHIH", kind, CLASS_IN, ttl_s, len(packed)) + packed)
    for record in records:
        if len(record) > room:
            truncated = True
            break
        body += record
        room -= len(record)
        count += 1
    if truncated:
        flags |= _TC
    return _HEADER.pack(query.number, flags, 1, count, 0, 1 if opt else 0) + bytes(body) + opt


def build_refusal(raw: bytes, code: Code) -> bytes | None:
    """A bare response code to a message that could not be parsed; None if not even its header is there."""
    if len(raw) < 12 or raw[2] & 0x80:
        return None
    number, flags = struct.unpack_from(">HH", raw)
    return _HEADER.pack(number, _QR | (flags & 0x7800) | (flags & _RD) | _RA | (code & 0xF), 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Response:
    """What is looked at in an upstream's response; the rest is passed on as it is."""

    number: int
    question: Question
    code: int
    truncated: bool


def parse_response(raw: bytes) -> Response:
    """Raises DnsFault for what cannot be an answer to one question."""
    if not 12 <= len(raw) <= MESSAGE_BYTES_MAX:
        raise DnsFault(f"{len(raw)} bytes are no DNS message", None)
    number, flags, questions, *_ = _HEADER.unpack_from(raw)
    if not flags & _QR or questions != 1:
        raise DnsFault("no response to one question", None)
    question, _ = _parse_question(raw)
    return Response(number, question, flags & 0xF, bool(flags & _TC))


def answers_of(raw: bytes) -> list[tuple[str, int, int, bytes]]:
    """Owner, type, TTL and data of every record of the answer section. Raises DnsFault."""
    if len(raw) < 12:
        raise DnsFault("too short", None)
    _, _, questions, answers, _, _ = _HEADER.unpack_from(raw)
    offset = 12
    for _ in range(questions):
        _, offset = _parse_name(raw, offset)
        offset += 4
    found: list[tuple[str, int, int, bytes]] = []
    for _ in range(answers):
        name, offset = _parse_name(raw, offset)
        if offset + 10 > len(raw):
            raise DnsFault("a record ends early", Code.FORMERR)
        kind, _, ttl, length = struct.unpack_from(">HHIH", raw, offset)
        offset += 10
        if offset + length > len(raw):
            raise DnsFault("a record ends early", Code.FORMERR)
        found.append((name, kind, ttl, raw[offset : offset + length]))
        offset += length
    return found


def with_number(raw: bytes, number: int) -> bytes:
    """The message with another query ID."""
    return struct.pack(">H", number) + raw[2:]
