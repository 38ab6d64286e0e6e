"""A connection: the peer's bytes, split anyhow, become frames; DATA goes to the owners of streams as it arrives."""

from __future__ import annotations

from typing import Final

from ztunnel.core import frames
from ztunnel.core.floods import Bucket
from ztunnel.core.frames import HEADER, HEADER_BYTES, WINDOW_MAX, Code
from ztunnel.core.http2.answers import Answers
from ztunnel.core.http2.terms import ConnectionOwner, Fault, Limits, Role
from ztunnel.core.output import Output
from ztunnel.core.streams import Stream

_SETTINGS_BYTES_MAX: Final = 6 * 64
_GOAWAY_BYTES_MAX: Final = 16 * 1024


class Connection(Answers):
    """One HTTP/2 connection. ``closed``: a GOAWAY was put out because of ``fault``, or the end was asked for."""

    __slots__ = (
        "_calm_data",
        "_data_end",
        "_data_left",
        "_data_stream",
        "_need",
        "_partial",
        "_preface_left",
        "_skip_left",
    )

    def __init__(self, role: Role, owner: ConnectionOwner, output: Output, limits: Limits, now: float) -> None:
        super().__init__(role, owner, output, limits, now)
        self._partial = bytearray()
        self._need = HEADER_BYTES
        self._preface_left = frames.PREFACE if role is Role.SERVER else b""
        self._data_left = 0
        self._skip_left = 0
        self._data_stream: Stream | None = None
        self._data_end = False
        self._calm_data = Bucket(1000, 100)

    def receive(self, data: memoryview, now: float) -> None:
        """Bytes of the peer, split anyhow. Never raises for what they are: see ``closed`` and ``fault``."""
        if self.closed:
            return
        self._heard_at = now
        try:
            self._receive(data, now)
        except Fault as fault:
            self._fail(fault)

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
                        raise Fault(Code.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
                    self._receive_window -= length
                    stream.receive_window -= length
                    if self._receive_window < 0:
                        raise Fault(Code.FLOW_CONTROL_ERROR, "more DATA than the connection has credit")
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
                raise Fault(Code.PROTOCOL_ERROR, "the connection does not begin with HTTP/2's preface")
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
            raise Fault(Code.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
        if self._block is not None and (kind != frames.CONTINUATION or identifier != self._block_stream):
            raise Fault(Code.PROTOCOL_ERROR, "a header block was interrupted")
        if not self._settings_received and (kind != frames.SETTINGS or flags & frames.ACK):
            raise Fault(Code.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        if kind in (frames.SETTINGS, frames.PING, frames.GOAWAY):
            if identifier:
                raise Fault(Code.PROTOCOL_ERROR, "a frame of the connection came on a stream")
        elif kind <= frames.CONTINUATION and kind != frames.WINDOW_UPDATE and not identifier:
            raise Fault(Code.PROTOCOL_ERROR, "a frame of a stream came on the connection")
        match kind:
            case frames.HEADERS | frames.CONTINUATION:
                if len(self._block or b"") + length > self.limits.header_list_bytes + 256 + 5:
                    raise Fault(Code.ENHANCE_YOUR_CALM, "a header block is larger than was advertised")
                wrong = False
            case frames.PRIORITY:
                wrong = length != 5
            case frames.RST_STREAM | frames.WINDOW_UPDATE:
                wrong = length != 4
            case frames.SETTINGS:
                wrong = length % 6 != 0 or (bool(flags & frames.ACK) and length != 0)
                if length > _SETTINGS_BYTES_MAX:
                    raise Fault(Code.ENHANCE_YOUR_CALM, "SETTINGS with too many parameters")
            case frames.PING:
                wrong = length != 8
            case frames.GOAWAY:
                wrong = length < 8
                if length > _GOAWAY_BYTES_MAX:
                    raise Fault(Code.ENHANCE_YOUR_CALM, "GOAWAY with too much debug data")
            case frames.PUSH_PROMISE:
                raise Fault(Code.PROTOCOL_ERROR, "PUSH_PROMISE was not allowed")
            case frames.DATA:
                wrong = False
            case _:
                wrong = False
                if not self._calm_other.take(now):
                    raise Fault(Code.ENHANCE_YOUR_CALM, "too many frames of unknown types")
        if wrong:
            raise Fault(Code.FRAME_SIZE_ERROR, f"a frame of type {kind} with {length} bytes")

    # --- DATA ----------------------------------------------------------------------------------------------

    def _data_begin(self, flags: int, identifier: int, length: int, first: bytes, now: float) -> None:
        """A DATA frame that is empty, padded, or not on an open stream, or exceeds its credit."""
        padding = 0
        if flags & frames.PADDED:
            if not length or first[0] >= length:
                raise Fault(Code.PROTOCOL_ERROR, "padding is as long as its frame")
            padding = first[0] + 1
        if self._is_idle(identifier):
            raise Fault(Code.PROTOCOL_ERROR, "DATA on a stream that was never opened")
        self._receive_window -= length
        if self._receive_window < 0:
            raise Fault(Code.FLOW_CONTROL_ERROR, "more DATA than the connection has credit")
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
            raise Fault(Code.ENHANCE_YOUR_CALM, "too many DATA frames without data")
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
