"""What a frame of the peer does, DATA aside: a stream begins or is reset, there is more credit, SETTINGS count, a PING
is answered."""

from __future__ import annotations

from typing import Final

from ztunnel.core import frames, headers
from ztunnel.core.floods import Bucket
from ztunnel.core.frames import WINDOW_MAX, Code
from ztunnel.core.headers import Header
from ztunnel.core.http2.sending import Sending
from ztunnel.core.http2.terms import ConnectionOwner, Fault, Limits, Role
from ztunnel.core.output import Output
from ztunnel.core.streams import DISCARD, Stream

_CONTINUATIONS_MAX: Final = 64
_LATE_BYTES_MAX: Final = 1024 * 1024
"""Control frames the peer does not read; an honest peer leaves far less lying."""


class Answers(Sending):
    """Base of `Connection`, which has checked type, length and stream of a frame before `_control` is called."""

    __slots__ = (
        "_block",
        "_block_flags",
        "_block_frames",
        "_block_stream",
        "_calm_other",
        "_calm_ping",
        "_calm_reset",
        "_calm_settings",
        "_decoder",
        "_settings_received",
    )

    def __init__(self, role: Role, owner: ConnectionOwner, output: Output, limits: Limits, now: float) -> None:
        super().__init__(role, owner, output, limits, now)
        self._decoder = headers.Decoder(limits.header_list_bytes)
        self._settings_received = False
        self._block: bytearray | None = None
        self._block_stream = 0
        self._block_flags = 0
        self._block_frames = 0
        self._calm_ping = Bucket(100, 10)
        self._calm_settings = Bucket(20, 1)
        self._calm_reset = Bucket(200, 100)
        self._calm_other = Bucket(1000, 100)

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
                    raise Fault(Code.ENHANCE_YOUR_CALM, "too many PRIORITY frames")
                if frames.word(payload) & WINDOW_MAX == identifier:
                    self._stream_fault(identifier, Code.PROTOCOL_ERROR, now, "a stream depends on itself")
        if len(self.output.late) > _LATE_BYTES_MAX:
            raise Fault(Code.ENHANCE_YOUR_CALM, "the peer does not read what it asks for")

    # --- streams -------------------------------------------------------------------------------------------

    def _headers_begin(self, flags: int, identifier: int, payload: bytes, now: float) -> None:
        start, end = 0, len(payload)
        if flags & frames.PADDED:
            if not payload:
                raise Fault(Code.FRAME_SIZE_ERROR, "HEADERS without room for its padding")
            start, end = 1, end - payload[0]
        own = False
        if flags & frames.PRIORITY_FLAG:
            if end - start < 5:
                raise Fault(Code.PROTOCOL_ERROR, "HEADERS without room for its priority")
            own = frames.word(payload, start) & WINDOW_MAX == identifier
            start += 5
        if start > end:
            raise Fault(Code.PROTOCOL_ERROR, "padding is as long as its frame")
        if flags & frames.END_HEADERS:
            self._headers_done(identifier, payload[start:end], bool(flags & frames.END_STREAM), now)
        else:
            self._block = bytearray(payload[start:end])
            self._block_stream, self._block_flags, self._block_frames = identifier, flags, 0
        if own:
            self._stream_fault(identifier, Code.PROTOCOL_ERROR, now, "a stream depends on itself")

    def _continuation(self, flags: int, payload: bytes, now: float) -> None:
        if self._block is None:
            raise Fault(Code.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        self._block += payload
        self._block_frames += 1
        if self._block_frames > _CONTINUATIONS_MAX:
            raise Fault(Code.ENHANCE_YOUR_CALM, "too many CONTINUATION frames")
        if flags & frames.END_HEADERS:
            block, self._block = bytes(self._block), None
            self._headers_done(self._block_stream, block, bool(self._block_flags & frames.END_STREAM), now)

    def _headers_done(self, identifier: int, block: bytes, end_stream: bool, now: float) -> None:
        try:
            fields = self._decoder.decode(block)
        except headers.HeaderFault as fault:
            raise Fault(Code.ENHANCE_YOUR_CALM if fault.calm else Code.COMPRESSION_ERROR, str(fault)) from None
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
                raise Fault(Code.PROTOCOL_ERROR, "HEADERS on a stream that was never opened")
            if not self._closed_streams.get(identifier, True):
                raise Fault(Code.STREAM_CLOSED, "HEADERS on a closed stream")
            return
        if identifier % 2 == 0:
            raise Fault(Code.PROTOCOL_ERROR, "a client opens odd streams")
        if identifier <= self._last_peer:
            by_us = self._closed_streams.get(identifier)
            if by_us is None:
                raise Fault(Code.PROTOCOL_ERROR, "a stream identifier was used again or goes back")
            if not by_us:
                raise Fault(Code.STREAM_CLOSED, "HEADERS on a closed stream")
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
            stream.returned_at = now
            self.streams[identifier] = stream
            self.owner.request(stream, fields)
            if end_stream and stream.remote_open:
                self._remote_end(stream)

    def _rst_stream(self, identifier: int, code: int, now: float) -> None:
        stream = self.streams.get(identifier)
        if stream is None:
            if self._is_idle(identifier):
                raise Fault(Code.PROTOCOL_ERROR, "RST_STREAM on a stream that was never opened")
            return
        if self._role is Role.SERVER and not stream.answered and not self._calm_reset.take(now):
            raise Fault(Code.ENHANCE_YOUR_CALM, "too many streams were reset before they were answered")
        self._forget(stream, reset_by_us=False)
        owner, stream.owner = stream.owner, DISCARD
        owner.stream_reset(code)

    # --- credit --------------------------------------------------------------------------------------------

    def _window_update(self, identifier: int, increment: int, now: float) -> None:
        if not identifier:
            if not increment:
                raise Fault(Code.PROTOCOL_ERROR, "WINDOW_UPDATE of nothing")
            self.send_window += increment
            if self.send_window > WINDOW_MAX:
                raise Fault(Code.FLOW_CONTROL_ERROR, "the connection's window overflows")
            self._unblock(list(self._blocked.values()))
            return
        stream = self.streams.get(identifier)
        if stream is None:
            if self._is_idle(identifier):
                raise Fault(Code.PROTOCOL_ERROR, "WINDOW_UPDATE on a stream that was never opened")
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

    # --- the connection ------------------------------------------------------------------------------------

    def _settings(self, flags: int, payload: bytes, now: float) -> None:
        if flags & frames.ACK:
            if not self._settings_acknowledged:
                self._settings_acknowledged = True
                self._round_trip_s = now - self._started_at
            if not self._calm_other.take(now):
                raise Fault(Code.ENHANCE_YOUR_CALM, "too many acknowledged SETTINGS")
            return
        if not self._calm_settings.take(now):
            raise Fault(Code.ENHANCE_YOUR_CALM, "too many SETTINGS")
        self._settings_received = True
        wider = False
        for key, value in frames.read_settings(payload):
            match key:
                case frames.ENABLE_PUSH:
                    if value > (1 if self._role is Role.SERVER else 0):
                        raise Fault(Code.PROTOCOL_ERROR, f"SETTINGS_ENABLE_PUSH of {value}")
                case frames.INITIAL_WINDOW_SIZE:
                    wider = self._initial_window(value) or wider
                case frames.MAX_FRAME_SIZE:
                    if not frames.FRAME_BYTES_DEFAULT <= value <= frames.FRAME_BYTES_LIMIT:
                        raise Fault(Code.PROTOCOL_ERROR, f"SETTINGS_MAX_FRAME_SIZE of {value}")
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
            raise Fault(Code.FLOW_CONTROL_ERROR, f"SETTINGS_INITIAL_WINDOW_SIZE of {value}")
        change = value - self.peer_stream_window
        self.peer_stream_window = value
        for stream in self.streams.values():
            stream.send_window += change
            if stream.send_window > WINDOW_MAX:
                raise Fault(Code.FLOW_CONTROL_ERROR, "a stream's window overflows")
        return change > 0

    def _ping(self, flags: int, payload: bytes, now: float) -> None:
        if flags & frames.ACK:
            self._ping_at = None
            return
        if not self._calm_ping.take(now):
            raise Fault(Code.ENHANCE_YOUR_CALM, "too many PING frames")
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
