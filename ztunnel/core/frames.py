"""HTTP/2 frames as bytes: numbers of RFC 9113 and the builders of the frames we send.

Nothing here knows of connections or streams; `ztunnel.core.http2` decides what may be sent and received.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADER_BYTES: Final = 9

HEADER: Final = struct.Struct(">IBI")
"""Length (24 bits) and type (8) in one word, flags, stream identifier."""
FLAGS_AT: Final = 4
_WORD: Final = struct.Struct(">I")
_SETTING: Final = struct.Struct(">HI")

DATA: Final = 0
HEADERS: Final = 1
PRIORITY: Final = 2
RST_STREAM: Final = 3
SETTINGS: Final = 4
PUSH_PROMISE: Final = 5
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
PRIORITY_FLAG: Final = 0x20

HEADER_TABLE_SIZE: Final = 1
ENABLE_PUSH: Final = 2
MAX_CONCURRENT_STREAMS: Final = 3
INITIAL_WINDOW_SIZE: Final = 4
MAX_FRAME_SIZE: Final = 5
MAX_HEADER_LIST_SIZE: Final = 6

WINDOW_DEFAULT: Final = 65535
WINDOW_MAX: Final = 2**31 - 1
FRAME_BYTES_DEFAULT: Final = 16384
FRAME_BYTES_LIMIT: Final = 2**24 - 1
STREAM_ID_MAX: Final = 2**31 - 1


class Code(enum.IntEnum):
    """Error codes of RFC 9113, section 7."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12
    HTTP_1_1_REQUIRED = 13


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One whole frame."""
    return HEADER.pack(len(payload) << 8 | kind, flags, stream) + payload


def settings(values: dict[int, int]) -> bytes:
    """A SETTINGS frame with these parameters in this order."""
    return frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(key, value) for key, value in values.items()))


SETTINGS_ACK: Final = frame(SETTINGS, ACK, 0)


def read_settings(payload: bytes | memoryview) -> list[tuple[int, int]]:
    """Parameters in order; the length must be a multiple of 6."""
    return list(_SETTING.iter_unpack(payload))


def window_update(stream: int, increment: int) -> bytes:
    """WINDOW_UPDATE; stream 0 is the connection."""
    return frame(WINDOW_UPDATE, 0, stream, _WORD.pack(increment))


def rst_stream(stream: int, code: int) -> bytes:
    """RST_STREAM."""
    return frame(RST_STREAM, 0, stream, _WORD.pack(code))


def ping(payload: bytes, *, ack: bool) -> bytes:
    """PING with 8 bytes."""
    return frame(PING, ACK if ack else 0, 0, payload)


def goaway(last_stream: int, code: int, debug: bytes = b"") -> bytes:
    """GOAWAY; ``debug`` is for the operator of the peer."""
    return frame(GOAWAY, 0, 0, _WORD.pack(last_stream) + _WORD.pack(code) + debug)


def header_block(stream: int, block: bytes, *, end_stream: bool, frame_bytes_max: int) -> bytes:
    """HEADERS, and CONTINUATION where the block does not fit in one frame of the peer's limit."""
    flags = END_STREAM if end_stream else 0
    if len(block) <= frame_bytes_max:
        return frame(HEADERS, flags | END_HEADERS, stream, block)
    out = frame(HEADERS, flags, stream, block[:frame_bytes_max])
    rest = block[frame_bytes_max:]
    while rest:
        part, rest = rest[:frame_bytes_max], rest[frame_bytes_max:]
        out += frame(CONTINUATION, 0 if rest else END_HEADERS, stream, part)
    return out


def word(payload: bytes | memoryview, offset: int = 0) -> int:
    """A 32-bit number in network order."""
    value: int = _WORD.unpack_from(payload, offset)[0]
    return value
