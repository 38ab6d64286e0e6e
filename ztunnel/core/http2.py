"""An HTTP/2 connection, client or server (RFC 9113), as far as CONNECT tunnels need it, and strict in that.

Bytes go in by `Connection.receive`, frames come out in `Connection.output`; there is no socket and no clock
here. DATA has a path of its own: payloads are handed to the stream's owner as they arrive, never collected,
and leave by `reserve` and `commit`, which let the caller receive straight into the output buffer.

Whatever a peer may cause is bounded: frame sizes before anything is kept, header blocks, streams, credit, and
by token buckets everything that costs us more than it costs the peer (`ztunnel.core.floods`). A peer that
breaks a rule gets GOAWAY or RST_STREAM with the RFC's code; afterwards nothing it sends is looked at.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, Protocol

from ambient.errors import OurFault, PeerFault
from ztunnel.core import frames, headers
from ztunnel.core.floods import Bucket
from ztunnel.core.frames import HEADER, HEADER_BYTES, WINDOW_MAX, Code
from ztunnel.core.headers import Header
from ztunnel.core.output import Output
from ztunnel.core.streams import DISCARD, Stream, StreamOwner

FULL: Final = memoryview(b"")
"""`Connection.reserve`: the output buffer has no room; write it out first."""

_MIN_ROOM: Final = 1024
_CLOSED_REMEMBERED: Final = 256
_CONTINUATIONS_MAX: Final = 64
_SETTINGS_BYTES_MAX: Final = 6 * 64
_GOAWAY_BYTES_MAX: Final = 16 * 1024
_LATE_BYTES_MAX: Final = 1024 * 1024
"""Control frames the peer does not read; an honest peer leaves far less lying."""


class Role(enum.Enum):
    CLIENT = "client"
    SERVER = "server"


@dataclass(frozen=True, slots=True)
class Limits:
    """What we advertise and enforce; the numbers are those of Istio's ztunnel."""

    stream_window: int = 4 * 1024 * 1024
    connection_window: int = 16 * 1024 * 1024
    frame_bytes: int = 1024 * 1024
    header_list_bytes: int = 64 * 1024
    """16 KiB for a client, 64 KiB for a server."""
    streams: int = 200
    """Concurrent streams a peer may open (server)."""
    chunk_bytes: int = 128 * 1024
    """Largest DATA frame we send: how long one stream may keep the others waiting."""
    settings_timeout_s: float = 10.0
    ping_interval_s: float = 10.0
    ping_timeout_s: float = 20.0
    drain_pause_s: float = 1.0
    """Between the first GOAWAY and the one that names the last stream."""


CLIENT_LIMITS: Final = Limits(header_list_bytes=16 * 1024)
SERVER_LIMITS: Final = Limits()


class ConnectionOwner(Protocol):
    """Who owns the connection."""

    def request(self, stream: Stream, fields: list[Header]) -> None:
        """Server: a well-formed request. Sets ``stream.owner``."""

    def going_away(self) -> None:
        """The peer sent GOAWAY: open no more streams here."""


class _Fault(PeerFault):
    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


class Connection:
    """One HTTP/2 connection. ``closed``: a GOAWAY was put out because of ``fault``, or the end was asked for."""

    __slots__ = (
        "_block",
        "_block_flags",
        "_block_frames",
        "_block_stream",
        "_blocked",
        "_calm_data",
        "_calm_errors",
        "_calm_other",
        "_calm_ping",
        "_calm_reset",
        "_calm_settings",
        "_closed_streams",
        "_data_end",
        "_data_left",
        "_data_stream",
        "_decoder",
        "_drain_at",
        "_goaway_sent",
        "_heard_at",
        "_last_peer",
        "_need",
        "_next_id",
        "_partial",
        "_ping_at",
        "_preface_left",
        "_receive_window",
        "_return_connection_at",
        "_return_stream_at",
        "_role",
        "_settings_acknowledged",
        "_settings_received",
        "_skip_left",
        "_started_at",
        "_unreturned",
        "chunk",
        "closed",
        "draining",
        "fault",
        "limits",
        "output",
        "owner",
        "peer_frame_bytes",
        "peer_going_away",
        "peer_stream_window",
        "peer_streams",
        "send_window",
        "streams",
    )

    def __init__(self, role: Role, owner: ConnectionOwner, output: Output, limits: Limits, now: float) -> None:
        self._role = role
        self.owner = owner
        self.output = output
        self.limits = limits
        self.streams: dict[int, Stream] = {}
        self.closed = False
        self.fault: tuple[Code, str] | None = None
        self.draining = False
        self.peer_going_away = False
        self.peer_frame_bytes = frames.FRAME_BYTES_DEFAULT
        self.peer_stream_window = frames.WINDOW_DEFAULT
        self.peer_streams = WINDOW_MAX
        self.chunk = min(frames.FRAME_BYTES_DEFAULT, limits.chunk_bytes)
        self.send_window = frames.WINDOW_DEFAULT
        self._receive_window = limits.connection_window
        self._unreturned = 0
        self._return_connection_at = limits.connection_window >> 1
        self._return_stream_at = limits.stream_window >> 1
        self._blocked: dict[int, Stream] = {}
        self._next_id = 1
        self._last_peer = 0
        self._goaway_sent: int | None = None
        self._closed_streams: OrderedDict[int, bool] = OrderedDict()
        self._decoder = headers.Decoder(limits.header_list_bytes)
        self._partial = bytearray()
        self._need = HEADER_BYTES
        self._preface_left = frames.PREFACE if role is Role.SERVER else b""
        self._settings_received = False
        self._settings_acknowledged = False
        self._block: bytearray | None = None
        self._block_stream = 0
        self._block_flags = 0
        self._block_frames = 0
        self._data_left = 0
        self._skip_left = 0
        self._data_stream: Stream | None = None
        self._data_end = False
        self._started_at = now
        self._heard_at = now
        self._ping_at: float | None = None
        self._drain_at: float | None = None
        self._calm_ping = Bucket(100, 10)
        self._calm_settings = Bucket(20, 1)
        self._calm_data = Bucket(1000, 100)
        self._calm_reset = Bucket(200, 100)
        self._calm_errors = Bucket(200, 20)
        self._calm_other = Bucket(1000, 100)
        self._start()

    def _start(self) -> None:
        limits = self.limits
        values = {
            frames.INITIAL_WINDOW_SIZE: limits.stream_window,
            frames.MAX_FRAME_SIZE: limits.frame_bytes,
            frames.MAX_HEADER_LIST_SIZE: limits.header_list_bytes,
        }
        if self._role is Role.CLIENT:
            self.output.put(frames.PREFACE + frames.settings({frames.ENABLE_PUSH: 0, **values}))
        else:
            self.output.put(frames.settings({frames.MAX_CONCURRENT_STREAMS: limits.streams, **values}))
        self.output.put(frames.window_update(0, limits.connection_window - frames.WINDOW_DEFAULT))

    # --- sending -------------------------------------------------------------------------------------------

    @property
    def can_open(self) -> bool:
        """Whether a client may open another stream as far as the peer is concerned."""
        return (
            not (self.closed or self.draining or self.peer_going_away)
            and len(self.streams) < self.peer_streams
            and self._next_id <= frames.STREAM_ID_MAX
        )

    @property
    def exhausted(self) -> bool:
        """Every stream identifier was used: a client needs another connection."""
        return self._next_id > frames.STREAM_ID_MAX

    def open(self, owner: StreamOwner, block: bytes) -> Stream:
        """Client: send a request whose encoded header block is ``block``. Raises OurFault unless ``can_open``."""
        if self._role is not Role.CLIENT or not self.can_open:
            raise OurFault("a stream was opened where none may be")
        stream = Stream(self._next_id, owner, self.peer_stream_window, self.limits.stream_window)
        self._next_id += 2
        self.streams[stream.id] = stream
        self._put_headers(stream, block, end_stream=False)
        return stream

    def respond(self, stream: Stream, block: bytes, *, end_stream: bool = False) -> None:
        """Server: send the response. Nothing happens if the stream is gone."""
        if stream.dead or not stream.local_open:
            return
        stream.answered = True
        self._put_headers(stream, block, end_stream=end_stream)
        if end_stream:
            self._local_end(stream)

    def _put_headers(self, stream: Stream, block: bytes, *, end_stream: bool) -> None:
        self.output.put(
            frames.header_block(stream.id, block, end_stream=end_stream, frame_bytes_max=self.peer_frame_bytes)
        )

    def reserve(self, stream: Stream) -> memoryview | None:
        """Where to put the next payload of the stream, then `commit`. None: no credit, the owner will be told
        (`stream_writable`). `FULL`: write the output out first."""
        output = self.output
        start = output.end + HEADER_BYTES
        room = output.size - start
        if room < _MIN_ROOM or output.late:
            return FULL
        limit = stream.send_window
        if limit > self.send_window:
            limit = self.send_window
        if limit <= 0:
            stream.blocked = True
            self._blocked[stream.id] = stream
            return None
        if limit > self.chunk:
            limit = self.chunk
        if limit > room:
            limit = room
        view = output.view
        if view is None:
            view = output.borrow()
        return view[start : start + limit]

    def commit(self, stream: Stream, count: int) -> None:
        """The first ``count`` bytes of what `reserve` returned are the stream's next payload."""
        output = self.output
        at = output.last_at = output.end
        identifier = output.last = stream.id
        HEADER.pack_into(output.view, at, count << 8, 0, identifier)  # type: ignore[arg-type]
        output.end = at + HEADER_BYTES + count
        stream.send_window -= count
        self.send_window -= count

    def finish(self, stream: Stream) -> None:
        """Send END_STREAM: no more bytes of ours."""
        if stream.dead or not stream.local_open:
            return
        output = self.output
        if output.last == stream.id and output.view is not None:  # its last bytes have not left yet
            output.view[output.last_at + frames.FLAGS_AT] = frames.END_STREAM
        else:
            output.put(frames.frame(frames.DATA, frames.END_STREAM, stream.id))
        self._local_end(stream)

    def reset(self, stream: Stream, code: Code) -> None:
        """Send RST_STREAM and forget the stream; its owner is not called."""
        if stream.dead:
            return
        self.output.put(frames.rst_stream(stream.id, code))
        self._forget(stream, reset_by_us=True)

    def consumed(self, stream: Stream, count: int) -> None:
        """The application took ``count`` bytes of the stream. Credit is returned in large steps."""
        if self.closed:
            return
        self._unreturned += count
        if self._unreturned >= self._return_connection_at:
            self.output.put(frames.window_update(0, self._unreturned))
            self._receive_window += self._unreturned
            self._unreturned = 0
        if stream.remote_open:
            stream.unreturned += count
            if stream.unreturned >= self._return_stream_at:
                self.output.put(frames.window_update(stream.id, stream.unreturned))
                stream.receive_window += stream.unreturned
                stream.unreturned = 0

    def drain(self, now: float) -> None:
        """Server: announce that no new stream will be taken; `tick` names the last one after a pause."""
        if self.draining or self.closed:
            return
        self.draining = True
        if self._role is Role.SERVER:
            self.output.put(frames.goaway(frames.STREAM_ID_MAX, Code.NO_ERROR))
            self._drain_at = now + self.limits.drain_pause_s
        else:
            self.output.put(frames.goaway(0, Code.NO_ERROR))

    def close(self, code: Code = Code.NO_ERROR, message: str = "") -> None:
        """Put out the last GOAWAY; every stream's owner is told that it is reset."""
        if self.closed:
            return
        self.closed = True
        self.output.put(frames.goaway(self._last_peer, code, message.encode()[:256]))
        self.abandon(code)

    def abandon(self, code: Code = Code.CANCEL) -> None:
        """The transport is gone: tell every stream's owner."""
        self.closed = True
        streams = list(self.streams.values())
        self.streams.clear()
        self._blocked.clear()
        for stream in streams:
            stream.dead = True
            stream.local_open = stream.remote_open = stream.receiving = False
            owner, stream.owner = stream.owner, DISCARD
            owner.stream_reset(code)

    def tick(self, now: float) -> None:
        """Once a second or so: timeouts and keepalive."""
        if self.closed:
            return
        if not self._settings_acknowledged and now - self._started_at > self.limits.settings_timeout_s:
            self._fail(_Fault(Code.SETTINGS_TIMEOUT, "SETTINGS were not acknowledged in time"))
        elif self._ping_at is not None:
            if now - self._ping_at > self.limits.ping_timeout_s:
                self._fail(_Fault(Code.NO_ERROR, "PING was not answered in time"))
        elif now - self._heard_at >= self.limits.ping_interval_s:
            self._ping_at = now
            self.output.put(frames.ping(b"ambient\0", ack=False))
        if self._drain_at is not None and now >= self._drain_at and not self.closed:
            self._drain_at = None
            self._goaway_sent = self._last_peer
            self.output.put(frames.goaway(self._last_peer, Code.NO_ERROR))

    # --- stream ends ---------------------------------------------------------------------------------------

    def _local_end(self, stream: Stream) -> None:
        stream.local_open = False
        if not stream.remote_open:
            self._forget(stream, reset_by_us=False)

    def _remote_end(self, stream: Stream) -> None:
        stream.remote_open = stream.receiving = False
        if not stream.local_open:
            self._forget(stream, reset_by_us=False)
        stream.owner.stream_end()

    def _forget(self, stream: Stream, *, reset_by_us: bool) -> None:
        stream.dead = True
        stream.local_open = stream.remote_open = stream.receiving = False
        self.streams.pop(stream.id, None)
        self._blocked.pop(stream.id, None)
        self._remember(stream.id, reset_by_us=reset_by_us)

    def _remember(self, identifier: int, *, reset_by_us: bool) -> None:
        self._closed_streams[identifier] = reset_by_us
        if len(self._closed_streams) > _CLOSED_REMEMBERED:
            self._closed_streams.popitem(last=False)

    def _stream_fault(self, identifier: int, code: Code, now: float, message: str) -> None:
        """RST_STREAM for a mistake of the peer. Too many of them end the connection."""
        if not self._calm_errors.take(now):
            raise _Fault(Code.ENHANCE_YOUR_CALM, f"too many stream errors, the last: {message}")
        self.output.put(frames.rst_stream(identifier, code))
        stream = self.streams.get(identifier)
        if stream is None:
            self._remember(identifier, reset_by_us=True)
            return
        self._forget(stream, reset_by_us=True)
        owner, stream.owner = stream.owner, DISCARD
        owner.stream_reset(code)

    def _is_idle(self, identifier: int) -> bool:
        ours = identifier % 2 == (1 if self._role is Role.CLIENT else 0)
        if ours:
            return self._role is Role.SERVER or identifier >= self._next_id
        return identifier > self._last_peer

    # --- receiving -----------------------------------------------------------------------------------------

    def receive(self, data: memoryview, now: float) -> None:
        """Bytes of the peer, split anyhow. Never raises for what they are: see ``closed`` and ``fault``."""
        if self.closed:
            return
        self._heard_at = now
        try:
            self._receive(data, now)
        except _Fault as fault:
            self._fail(fault)

    def _fail(self, fault: _Fault) -> None:
        if self.fault is None:
            self.fault = (fault.code, str(fault))
        self.close(fault.code, str(fault))

    def _receive(self, data: memoryview, now: float) -> None:
        at, end = 0, len(data)
        while at < end and not self.closed:
            if self._data_left:
                count = min(self._data_left, end - at)
                self._data_left -= count
                self._data_part(data[at : at + count], now)
                at += count
                continue
            if self._skip_left:
                count = min(self._skip_left, end - at)
                self._skip_left -= count
                at += count
                continue
            if self._partial or self._preface_left:
                at = self._receive_slowly(data, at, now)
                continue
            if end - at < HEADER_BYTES:
                self._partial += data[at:]
                self._need = HEADER_BYTES
                return
            word, flags, identifier = HEADER.unpack_from(data, at)
            length = word >> 8
            if not word & 0xFF and not flags & frames.PADDED and self._block is None:  # DATA
                stream = self.streams.get(identifier)
                if stream is not None and stream.receiving and (length or flags & frames.END_STREAM):
                    if length > self.limits.frame_bytes:
                        raise _Fault(Code.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
                    self._receive_window -= length
                    stream.receive_window -= length
                    if self._receive_window < 0:
                        raise _Fault(Code.FLOW_CONTROL_ERROR, "more DATA than the connection has credit")
                    if stream.receive_window >= 0:
                        at += HEADER_BYTES
                        if length <= end - at:
                            if length:
                                stream.owner.stream_data(data[at : at + length])
                                at += length
                            if flags & frames.END_STREAM and stream.remote_open:
                                self._remote_end(stream)
                        else:
                            self._data_left = length
                            self._data_stream = stream
                            self._data_end = bool(flags & frames.END_STREAM)
                        continue
                    stream.receive_window += length
                    self._receive_window += length
            elif word & 0xFF and word & 0xFF <= frames.CONTINUATION and length <= end - at - HEADER_BYTES:
                identifier &= WINDOW_MAX
                self._check_frame(word & 0xFF, flags, identifier, length, now)
                at += HEADER_BYTES
                self._control(word & 0xFF, flags, identifier, bytes(data[at : at + length]), now)
                at += length
                continue
            at = self._receive_slowly(data, at, now)

    def _receive_slowly(self, data: memoryview, at: int, now: float) -> int:
        """Everything but whole DATA frames of open streams: returns where to go on."""
        if self._preface_left:
            count = min(len(self._preface_left), len(data) - at)
            if data[at : at + count] != self._preface_left[:count]:
                raise _Fault(Code.PROTOCOL_ERROR, "the connection does not begin with HTTP/2's preface")
            self._preface_left = self._preface_left[count:]
            return at + count
        partial = self._partial
        if len(partial) < self._need:
            count = min(self._need - len(partial), len(data) - at)
            partial += data[at : at + count]
            at += count
            if len(partial) < self._need:
                return at
        word, flags, identifier = HEADER.unpack_from(partial, 0)
        kind, length = word & 0xFF, word >> 8
        identifier &= WINDOW_MAX
        if len(partial) == HEADER_BYTES:
            self._check_frame(kind, flags, identifier, length, now)
            if kind > frames.CONTINUATION:
                self._skip_left = length
                self._restart()
                return at
            wanted = (1 if flags & frames.PADDED and length else 0) if kind == frames.DATA else length
            if wanted:
                self._need = HEADER_BYTES + wanted
                return at
        payload = bytes(partial[HEADER_BYTES:])
        self._restart()
        if kind == frames.DATA:
            self._data_begin(flags, identifier, length, payload, now)
        else:
            self._control(kind, flags, identifier, payload, now)
        return at

    def _restart(self) -> None:
        self._partial.clear()
        self._need = HEADER_BYTES

    def _check_frame(self, kind: int, flags: int, identifier: int, length: int, now: float) -> None:
        """What a frame header alone can get wrong, before any of its payload is kept."""
        if length > self.limits.frame_bytes:
            raise _Fault(Code.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
        if self._block is not None and (kind != frames.CONTINUATION or identifier != self._block_stream):
            raise _Fault(Code.PROTOCOL_ERROR, "a header block was interrupted")
        if not self._settings_received and (kind != frames.SETTINGS or flags & frames.ACK):
            raise _Fault(Code.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        if kind in (frames.SETTINGS, frames.PING, frames.GOAWAY):
            if identifier:
                raise _Fault(Code.PROTOCOL_ERROR, "a frame of the connection came on a stream")
        elif kind <= frames.CONTINUATION and kind != frames.WINDOW_UPDATE and not identifier:
            raise _Fault(Code.PROTOCOL_ERROR, "a frame of a stream came on the connection")
        match kind:
            case frames.HEADERS | frames.CONTINUATION:
                if len(self._block or b"") + length > self.limits.header_list_bytes + 256 + 5:
                    raise _Fault(Code.ENHANCE_YOUR_CALM, "a header block is larger than was advertised")
                wrong = False
            case frames.PRIORITY:
                wrong = length != 5
            case frames.RST_STREAM | frames.WINDOW_UPDATE:
                wrong = length != 4
            case frames.SETTINGS:
                wrong = length % 6 != 0 or (bool(flags & frames.ACK) and length != 0)
                if length > _SETTINGS_BYTES_MAX:
                    raise _Fault(Code.ENHANCE_YOUR_CALM, "SETTINGS with too many parameters")
            case frames.PING:
                wrong = length != 8
            case frames.GOAWAY:
                wrong = length < 8
                if length > _GOAWAY_BYTES_MAX:
                    raise _Fault(Code.ENHANCE_YOUR_CALM, "GOAWAY with too much debug data")
            case frames.PUSH_PROMISE:
                raise _Fault(Code.PROTOCOL_ERROR, "PUSH_PROMISE was not allowed")
            case frames.DATA:
                wrong = False
            case _:
                wrong = False
                if not self._calm_other.take(now):
                    raise _Fault(Code.ENHANCE_YOUR_CALM, "too many frames of unknown types")
        if wrong:
            raise _Fault(Code.FRAME_SIZE_ERROR, f"a frame of type {kind} with {length} bytes")

    # --- DATA ----------------------------------------------------------------------------------------------

    def _data_begin(self, flags: int, identifier: int, length: int, first: bytes, now: float) -> None:
        """A DATA frame that is empty, padded, or not on an open stream, or exceeds its credit."""
        padding = 0
        if flags & frames.PADDED:
            if not length or first[0] >= length:
                raise _Fault(Code.PROTOCOL_ERROR, "padding is as long as its frame")
            padding = first[0] + 1
        if self._is_idle(identifier):
            raise _Fault(Code.PROTOCOL_ERROR, "DATA on a stream that was never opened")
        self._receive_window -= length
        if self._receive_window < 0:
            raise _Fault(Code.FLOW_CONTROL_ERROR, "more DATA than the connection has credit")
        end_stream = bool(flags & frames.END_STREAM)
        stream = self.streams.get(identifier)
        payload = length - padding
        if stream is None or not stream.remote_open:
            if stream is not None or not self._closed_streams.get(identifier, False):
                self._stream_fault(identifier, Code.STREAM_CLOSED, now, "DATA on a closed stream")
            stream = None
        elif not stream.receiving:
            self._stream_fault(identifier, Code.PROTOCOL_ERROR, now, "DATA before the response")
            stream = None
        elif stream.receive_window < length:
            self._stream_fault(identifier, Code.FLOW_CONTROL_ERROR, now, "more DATA than the stream has credit")
            stream = None
        if stream is None:
            self._unread(length)
            self._skip_left = length - (1 if padding else 0)
            return
        stream.receive_window -= length
        if padding:
            self.consumed(stream, padding)
        if payload == 0 and not end_stream and not self._calm_data.take(now):
            raise _Fault(Code.ENHANCE_YOUR_CALM, "too many DATA frames without data")
        self._skip_left = padding - 1 if padding else 0
        if payload:
            self._data_left = payload
            self._data_stream = stream
            self._data_end = end_stream
        elif end_stream:
            self._remote_end(stream)

    def _data_part(self, part: memoryview, now: float) -> None:
        stream = self._data_stream
        if stream is None:
            return
        if stream.dead:
            self._unread(len(part))
        else:
            stream.owner.stream_data(part)
        if not self._data_left:
            self._data_stream = None
            if self._data_end and stream.remote_open:
                self._remote_end(stream)

    def _unread(self, count: int) -> None:
        """Credit of the connection for bytes nobody will read."""
        self._unreturned += count
        if self._unreturned >= self._return_connection_at:
            self.output.put(frames.window_update(0, self._unreturned))
            self._receive_window += self._unreturned
            self._unreturned = 0

    # --- everything else -----------------------------------------------------------------------------------

    def _control(self, kind: int, flags: int, identifier: int, payload: bytes, now: float) -> None:
        match kind:
            case frames.HEADERS:
                self._headers_begin(flags, identifier, payload, now)
            case frames.CONTINUATION:
                self._continuation(flags, payload, now)
            case frames.WINDOW_UPDATE:
                self._window_update(identifier, frames.word(payload) & WINDOW_MAX, now)
            case frames.RST_STREAM:
                self._rst_stream(identifier, frames.word(payload), now)
            case frames.SETTINGS:
                self._settings(flags, payload, now)
            case frames.PING:
                self._ping(flags, payload, now)
            case frames.GOAWAY:
                self._goaway(frames.word(payload) & WINDOW_MAX)
            case frames.PRIORITY:
                if not self._calm_other.take(now):
                    raise _Fault(Code.ENHANCE_YOUR_CALM, "too many PRIORITY frames")
                if frames.word(payload) & WINDOW_MAX == identifier:
                    self._stream_fault(identifier, Code.PROTOCOL_ERROR, now, "a stream depends on itself")
        if len(self.output.late) > _LATE_BYTES_MAX:
            raise _Fault(Code.ENHANCE_YOUR_CALM, "the peer does not read what it asks for")

    def _headers_begin(self, flags: int, identifier: int, payload: bytes, now: float) -> None:
        start, end = 0, len(payload)
        if flags & frames.PADDED:
            if not payload:
                raise _Fault(Code.FRAME_SIZE_ERROR, "HEADERS without room for its padding")
            start, end = 1, end - payload[0]
        own = False
        if flags & frames.PRIORITY_FLAG:
            if end - start < 5:
                raise _Fault(Code.PROTOCOL_ERROR, "HEADERS without room for its priority")
            own = frames.word(payload, start) & WINDOW_MAX == identifier
            start += 5
        if start > end:
            raise _Fault(Code.PROTOCOL_ERROR, "padding is as long as its frame")
        if flags & frames.END_HEADERS:
            self._headers_done(identifier, payload[start:end], bool(flags & frames.END_STREAM), now)
        else:
            self._block = bytearray(payload[start:end])
            self._block_stream, self._block_flags, self._block_frames = identifier, flags, 0
        if own:
            self._stream_fault(identifier, Code.PROTOCOL_ERROR, now, "a stream depends on itself")

    def _continuation(self, flags: int, payload: bytes, now: float) -> None:
        if self._block is None:
            raise _Fault(Code.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        self._block += payload
        self._block_frames += 1
        if self._block_frames > _CONTINUATIONS_MAX:
            raise _Fault(Code.ENHANCE_YOUR_CALM, "too many CONTINUATION frames")
        if flags & frames.END_HEADERS:
            block, self._block = bytes(self._block), None
            self._headers_done(self._block_stream, block, bool(self._block_flags & frames.END_STREAM), now)

    def _headers_done(self, identifier: int, block: bytes, end_stream: bool, now: float) -> None:
        try:
            fields = self._decoder.decode(block)
        except headers.HeaderFault as fault:
            raise _Fault(Code.ENHANCE_YOUR_CALM if fault.calm else Code.COMPRESSION_ERROR, str(fault)) from None
        stream = self.streams.get(identifier)
        if stream is None:
            self._headers_without_stream(identifier, fields, end_stream, now)
        elif not stream.remote_open:
            self._stream_fault(identifier, Code.STREAM_CLOSED, now, "HEADERS on a closed stream")
        elif self._role is Role.CLIENT and not stream.answered:
            if problem := headers.check_response(fields):
                self._stream_fault(identifier, Code.PROTOCOL_ERROR, now, problem)
                return
            if fields[0][1][:1] == b"1":
                if end_stream or not self._calm_other.take(now):
                    self._stream_fault(identifier, Code.PROTOCOL_ERROR, now, "an interim response ends the stream")
                return
            stream.answered = stream.receiving = True
            stream.owner.stream_headers(fields)
            if end_stream and stream.remote_open:
                self._remote_end(stream)
        elif not end_stream or headers.check_trailers(fields):
            self._stream_fault(identifier, Code.PROTOCOL_ERROR, now, "malformed trailers")
        else:
            self._remote_end(stream)

    def _headers_without_stream(self, identifier: int, fields: list[Header], end_stream: bool, now: float) -> None:
        if self._role is Role.CLIENT:
            if self._is_idle(identifier):
                raise _Fault(Code.PROTOCOL_ERROR, "HEADERS on a stream that was never opened")
            if not self._closed_streams.get(identifier, True):
                raise _Fault(Code.STREAM_CLOSED, "HEADERS on a closed stream")
            return
        if identifier % 2 == 0:
            raise _Fault(Code.PROTOCOL_ERROR, "a client opens odd streams")
        if identifier <= self._last_peer:
            by_us = self._closed_streams.get(identifier)
            if by_us is None:
                raise _Fault(Code.PROTOCOL_ERROR, "a stream identifier was used again or goes back")
            if not by_us:
                raise _Fault(Code.STREAM_CLOSED, "HEADERS on a closed stream")
            return
        self._last_peer = identifier
        if self._goaway_sent is not None:
            self._stream_fault(identifier, Code.REFUSED_STREAM, now, "a stream after GOAWAY")
        elif len(self.streams) >= self.limits.streams:
            self._stream_fault(identifier, Code.REFUSED_STREAM, now, "more streams than were advertised")
        elif problem := self._decoder.check_request(fields):
            self._stream_fault(identifier, Code.PROTOCOL_ERROR, now, problem)
        else:
            stream = Stream(identifier, DISCARD, self.peer_stream_window, self.limits.stream_window)
            stream.receiving = True
            self.streams[identifier] = stream
            self.owner.request(stream, fields)
            if end_stream and stream.remote_open:
                self._remote_end(stream)

    def _window_update(self, identifier: int, increment: int, now: float) -> None:
        if not identifier:
            if not increment:
                raise _Fault(Code.PROTOCOL_ERROR, "WINDOW_UPDATE of nothing")
            self.send_window += increment
            if self.send_window > WINDOW_MAX:
                raise _Fault(Code.FLOW_CONTROL_ERROR, "the connection's window overflows")
            self._unblock(list(self._blocked.values()))
            return
        stream = self.streams.get(identifier)
        if stream is None:
            if self._is_idle(identifier):
                raise _Fault(Code.PROTOCOL_ERROR, "WINDOW_UPDATE on a stream that was never opened")
            return
        if not increment:
            self._stream_fault(identifier, Code.PROTOCOL_ERROR, now, "WINDOW_UPDATE of nothing")
            return
        stream.send_window += increment
        if stream.send_window > WINDOW_MAX:
            self._stream_fault(identifier, Code.FLOW_CONTROL_ERROR, now, "a stream's window overflows")
        elif stream.blocked:
            self._unblock([stream])

    def _unblock(self, streams: list[Stream]) -> None:
        for stream in streams:
            if stream.blocked and stream.send_window > 0 and self.send_window > 0:
                stream.blocked = False
                self._blocked.pop(stream.id, None)
                stream.owner.stream_writable()

    def _rst_stream(self, identifier: int, code: int, now: float) -> None:
        stream = self.streams.get(identifier)
        if stream is None:
            if self._is_idle(identifier):
                raise _Fault(Code.PROTOCOL_ERROR, "RST_STREAM on a stream that was never opened")
            return
        if self._role is Role.SERVER and not stream.answered and not self._calm_reset.take(now):
            raise _Fault(Code.ENHANCE_YOUR_CALM, "too many streams were reset before they were answered")
        self._forget(stream, reset_by_us=False)
        owner, stream.owner = stream.owner, DISCARD
        owner.stream_reset(code)

    def _settings(self, flags: int, payload: bytes, now: float) -> None:
        if flags & frames.ACK:
            self._settings_acknowledged = True
            if not self._calm_other.take(now):
                raise _Fault(Code.ENHANCE_YOUR_CALM, "too many acknowledged SETTINGS")
            return
        if not self._calm_settings.take(now):
            raise _Fault(Code.ENHANCE_YOUR_CALM, "too many SETTINGS")
        self._settings_received = True
        wider = False
        for key, value in frames.read_settings(payload):
            match key:
                case frames.ENABLE_PUSH:
                    if value > (1 if self._role is Role.SERVER else 0):
                        raise _Fault(Code.PROTOCOL_ERROR, f"SETTINGS_ENABLE_PUSH of {value}")
                case frames.INITIAL_WINDOW_SIZE:
                    wider = self._initial_window(value) or wider
                case frames.MAX_FRAME_SIZE:
                    if not frames.FRAME_BYTES_DEFAULT <= value <= frames.FRAME_BYTES_LIMIT:
                        raise _Fault(Code.PROTOCOL_ERROR, f"SETTINGS_MAX_FRAME_SIZE of {value}")
                    self.peer_frame_bytes = value
                    self.chunk = min(value, self.limits.chunk_bytes)
                case frames.MAX_CONCURRENT_STREAMS:
                    self.peer_streams = value
        self.output.put(frames.SETTINGS_ACK)
        if wider:  # only now: DATA that needs the new window must follow the acknowledgement
            self._unblock(list(self._blocked.values()))

    def _initial_window(self, value: int) -> bool:
        """Returns whether streams may send more than before."""
        if value > WINDOW_MAX:
            raise _Fault(Code.FLOW_CONTROL_ERROR, f"SETTINGS_INITIAL_WINDOW_SIZE of {value}")
        change = value - self.peer_stream_window
        self.peer_stream_window = value
        for stream in self.streams.values():
            stream.send_window += change
            if stream.send_window > WINDOW_MAX:
                raise _Fault(Code.FLOW_CONTROL_ERROR, "a stream's window overflows")
        return change > 0

    def _ping(self, flags: int, payload: bytes, now: float) -> None:
        if flags & frames.ACK:
            self._ping_at = None
            return
        if not self._calm_ping.take(now):
            raise _Fault(Code.ENHANCE_YOUR_CALM, "too many PING frames")
        self.output.put(frames.ping(payload, ack=True))

    def _goaway(self, last_stream: int) -> None:
        first = not self.peer_going_away
        self.peer_going_away = True
        if self._role is Role.CLIENT:
            refused = [stream for stream in self.streams.values() if stream.id > last_stream]
            for stream in refused:
                self._forget(stream, reset_by_us=True)
                owner, stream.owner = stream.owner, DISCARD
                owner.stream_reset(Code.REFUSED_STREAM)
        if first:
            self.owner.going_away()
