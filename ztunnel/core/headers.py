"""Header blocks: HPACK of both directions and the rules of RFC 9113, section 8.

We encode without a dynamic table, so a block is a constant that can be kept and sent again. Blocks of the same
form (our own peers send nothing else) are decoded here; anything that touches the dynamic table or Huffman
codes goes to the `hpack` library. Blocks read here do not change its state, so both may be mixed freely.
"""

from __future__ import annotations

import re
from typing import Final

import hpack

from ambient.errors import PeerFault

Header = tuple[bytes, bytes]

STATUS_200: Final = b"\x88"
"""The whole header block of an accepted CONNECT."""

FORWARDED_START: Final = b"\x00\x09forwarded"
"""How the first field that differs between two requests to one destination begins."""
_OWN_REST: Final = re.compile(
    rb"\x00\x09forwarded(.)(for=\"(?:[0-9.]{7,15}|\[[0-9a-fA-F:.]{2,45}\]):[0-9]{1,5}\")"
    rb"\x00\x0btraceparent\x37([0-9a-f-]{55})\Z",
    re.DOTALL,
).match
"""What our own peers send after that. Neither value has a character a field must not have."""
_PREFIXES_MAX: Final = 64
_PREFIX_BYTES_MAX: Final = 2048
"""Longer ones are decoded each time: what is kept of a peer's bytes must stay small."""

_OVERHEAD_BYTES: Final = 32  # per field, RFC 9113 section 6.5.2

_STATIC: Final = (
    ":authority :method=GET :method=POST :path=/ :path=/index.html :scheme=http :scheme=https :status=200 :status=204 "
    ":status=206 :status=304 :status=400 :status=404 :status=500 accept-charset accept-encoding=gzip,~deflate "
    "accept-language accept-ranges accept access-control-allow-origin age allow authorization cache-control "
    "content-disposition content-encoding content-language content-length content-location content-range content-type "
    "cookie date etag expect expires from host if-match if-modified-since if-none-match if-range if-unmodified-since "
    "last-modified link location max-forwards proxy-authenticate proxy-authorization range referer refresh retry-after "
    "server set-cookie strict-transport-security transfer-encoding user-agent vary via www-authenticate"
)
"""RFC 7541, appendix A; ~ stands for a space."""
_STATIC_TABLE: Final[tuple[Header, ...]] = tuple(
    (name.encode(), value.replace("~", " ").encode())
    for name, _, value in (entry.partition("=") for entry in _STATIC.split(" "))
)
_FULL_INDEX: Final = {field: index for index, field in reversed(list(enumerate(_STATIC_TABLE, 1)))}
_NAME_INDEX: Final = {field[0]: index for index, field in reversed(list(enumerate(_STATIC_TABLE, 1)))}

_TOKEN: Final = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz"
_HOP_BY_HOP: Final = frozenset({b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"})
_GOOD_NAMES: Final = frozenset({b"baggage", b"forwarded", b"traceparent", b"tracestate", b"user-agent"})
_BAD_VALUE: Final = re.compile(rb"[\r\n\0]|^[ \t]|[ \t]\Z").search
_REQUEST_PSEUDO: Final = frozenset({b":method", b":scheme", b":authority", b":path", b":protocol"})


class HeaderFault(PeerFault):
    """The block cannot be decoded; ``calm`` when it is too large rather than wrong."""

    def __init__(self, message: str, *, calm: bool = False) -> None:
        super().__init__(message)
        self.calm = calm


def _encode_int(value: int, prefix_bits: int, first: int) -> bytes:
    limit = (1 << prefix_bits) - 1
    if value < limit:
        return bytes((first | value,))
    out = bytearray((first | limit,))
    value -= limit
    while value >= 128:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode(fields: tuple[Header, ...] | list[Header]) -> bytes:
    """Encode without the dynamic table and without Huffman: the result depends on nothing else."""
    out = bytearray()
    for name, value in fields:
        index = _FULL_INDEX.get((name, value))
        if index is not None and value:
            out += _encode_int(index, 7, 0x80)
            continue
        out += _encode_int(_NAME_INDEX.get(name, 0), 4, 0)
        if name not in _NAME_INDEX:
            out += _encode_int(len(name), 7, 0) + name
        out += _encode_int(len(value), 7, 0) + value
    return bytes(out)


def _decode_int(block: bytes, at: int, value: int, limit: int) -> tuple[int, int]:
    """The rest of an integer whose prefix was full; at most four further bytes."""
    value = limit
    for shift in (0, 7, 14, 21):
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise HeaderFault("an HPACK integer is too long")


def decode_plain(block: bytes) -> list[Header] | None:
    """Decode a block of indexed static fields and raw literals that are not indexed; None for any other block."""
    fields: list[Header] = []
    at, end = 0, len(block)
    try:
        while at < end:
            byte = block[at]
            at += 1
            if byte >= 0x80:
                if not 0x80 < byte <= 0x80 + len(_STATIC_TABLE):
                    return None
                fields.append(_STATIC_TABLE[byte - 0x81])
                continue
            if byte >= 0x20:
                return None
            index = byte & 0x0F
            if index == 0x0F:
                index, at = _decode_int(block, at, index, 0x0F)
            if index:
                if index > len(_STATIC_TABLE):
                    return None
                name = _STATIC_TABLE[index - 1][0]
            else:
                length = block[at]
                at += 1
                if length >= 0x7F:
                    if length != 0x7F:
                        return None
                    length, at = _decode_int(block, at, length, 0x7F)
                name = block[at : at + length]
                at += length
            length = block[at]
            at += 1
            if length >= 0x7F:
                if length != 0x7F:
                    return None
                length, at = _decode_int(block, at, length, 0x7F)
            fields.append((name, block[at : at + length]))
            at += length
    except IndexError:
        raise HeaderFault("a header block ends inside a field") from None
    if at != end:
        raise HeaderFault("a header block ends inside a string")
    return fields


class Decoder:
    """Decodes the blocks of one connection, in order. ``list_bytes_max``: as SETTINGS_MAX_HEADER_LIST_SIZE counts."""

    __slots__ = ("_foreign", "_known", "_list_bytes_max", "_prefixes")

    def __init__(self, list_bytes_max: int) -> None:
        self._list_bytes_max = list_bytes_max
        self._prefixes: dict[bytes, tuple[Header, ...]] = {}
        self._known = 0
        self._foreign: hpack.Decoder | None = None

    def decode(self, block: bytes) -> list[Header]:
        """Raises HeaderFault: the connection's compression state is then lost and it must end."""
        fields = self._decode_known(block)
        if fields is None:
            fields = decode_plain(block)
        if fields is None:
            fields = self._decode_foreign(block)
        if sum(len(name) + len(value) for name, value in fields) + _OVERHEAD_BYTES * len(fields) > self._list_bytes_max:
            raise HeaderFault("the header list is larger than was advertised", calm=True)
        return fields

    def _decode_known(self, block: bytes) -> list[Header] | None:
        """A request of our own peers: what comes before `forwarded` is the same for each of one destination, so
        it is decoded and checked once. A prefix that decodes to its very end ends at a field's end."""
        self._known = 0
        cut = block.find(FORWARDED_START)
        if not 0 < cut <= _PREFIX_BYTES_MAX:
            return None
        prefix = block[:cut]
        fields = self._prefixes.get(prefix)
        if fields is None:
            try:
                decoded = decode_plain(prefix)
            except HeaderFault:
                return None
            if decoded is None or check_request(decoded):
                return None
            if len(self._prefixes) >= _PREFIXES_MAX:
                self._prefixes.clear()
            fields = self._prefixes[prefix] = tuple(decoded)
        own = _OWN_REST(block, cut)
        if own is not None and len(own[2]) == own[1][0] < 0x7F:
            self._known = len(fields) + 2
            return [*fields, (b"forwarded", own[2]), (b"traceparent", own[3])]
        rest = decode_plain(block[cut:])
        if rest is None:
            return None
        self._known = len(fields)
        return [*fields, *rest]

    def check_request(self, fields: list[Header]) -> str:
        """`check_request` of what `decode` just returned, without checking again what is known."""
        known = self._known
        if not known:
            return check_request(fields)
        return check_trailers(fields[known:]) if known < len(fields) else ""

    def _decode_foreign(self, block: bytes) -> list[Header]:
        if self._foreign is None:
            self._foreign = hpack.Decoder(max_header_list_size=self._list_bytes_max)
        try:
            return [(bytes(field[0]), bytes(field[1])) for field in self._foreign.decode(block, raw=True)]
        except hpack.exceptions.OversizedHeaderListError:
            raise HeaderFault("the header list is larger than was advertised", calm=True) from None
        except (hpack.exceptions.HPACKError, IndexError, ValueError) as error:
            raise HeaderFault(f"a header block does not decode: {type(error).__name__}") from None


def _check_field(name: bytes, value: bytes) -> str:
    if name not in _GOOD_NAMES:
        if not name or name.translate(None, _TOKEN):
            return "a field name is not a lower-case token"
        if name in _HOP_BY_HOP or (name == b"te" and value != b"trailers"):
            return "a field belongs to one connection only"
    if _BAD_VALUE(value):
        return "a field value has forbidden characters"
    return ""


def check_request(fields: list[Header]) -> str:
    """Why a request is malformed (RFC 9113, section 8.3.1); empty if it is well-formed."""
    pseudo: dict[bytes, bytes] = {}
    regular = False
    for name, value in fields:
        if name[:1] == b":":
            if regular or name in pseudo or name not in _REQUEST_PSEUDO:
                return "a pseudo-header is unknown, repeated or misplaced"
            pseudo[name] = value
            continue
        regular = True
        if problem := _check_field(name, value):
            return problem
    method = pseudo.get(b":method")
    if not method:
        return "no :method"
    if method == b"CONNECT" and b":protocol" not in pseudo:
        if b":scheme" in pseudo or b":path" in pseudo or not pseudo.get(b":authority"):
            return "CONNECT has :authority and neither :scheme nor :path"
    elif not pseudo.get(b":scheme") or not pseudo.get(b":path"):
        return "no :scheme or :path"
    return ""


def check_response(fields: list[Header]) -> str:
    """Why a response is malformed; empty if it is well-formed."""
    regular = False
    status = b""
    for name, value in fields:
        if name[:1] == b":":
            if regular or status or name != b":status":
                return "a pseudo-header is unknown, repeated or misplaced"
            status = value
            continue
        regular = True
        if problem := _check_field(name, value):
            return problem
    if len(status) != 3 or not status.isdigit():
        return "no three-digit :status"
    return ""


def check_trailers(fields: list[Header]) -> str:
    """Why trailers are malformed; empty if they are well-formed."""
    for name, value in fields:
        if problem := _check_field(name, value):
            return problem
    return ""
