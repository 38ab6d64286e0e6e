"""What a connection says of its own accord: SETTINGS at first, requests and responses, DATA, credit for what the
application took, PING while the peer is silent, GOAWAY at the end."""

from __future__ import annotations

from typing import Final

from ambient.errors import OurFault
from ztunnel.core import frames
from ztunnel.core.frames import HEADER, HEADER_BYTES, Code
from ztunnel.core.http2.lives import Lives
from ztunnel.core.http2.terms import ConnectionOwner, Fault, Limits, Role
from ztunnel.core.output import Output
from ztunnel.core.streams import Stream, StreamOwner

FULL: Final = memoryview(b"")
"""`Connection.reserve`: the output buffer has no room; write it out first."""

_MIN_ROOM: Final = 1024
_GROW_S: Final = 0.05
_SHRINK_S: Final = 1.0


class Sending(Lives):
    """Base of `Answers`."""

    __slots__ = (
        "_drain_at",
        "_goaway_sent",
        "_heard_at",
        "_ping_at",
        "_receive_window",
        "_return_connection_at",
        "_round_trip_s",
        "_settings_acknowledged",
        "_started_at",
        "_unreturned",
        "chunk",
        "fault",
        "peer_frame_bytes",
        "peer_stream_window",
        "send_window",
    )

    def __init__(self, role: Role, owner: ConnectionOwner, output: Output, limits: Limits, now: float) -> None:
        super().__init__(role, owner, output, limits)
        self.fault: tuple[Code, str] | None = None
        self.peer_frame_bytes = frames.FRAME_BYTES_DEFAULT
        self.peer_stream_window = frames.WINDOW_DEFAULT
        self.chunk = min(frames.FRAME_BYTES_DEFAULT, limits.chunk_bytes)
        self.send_window = frames.WINDOW_DEFAULT
        self._receive_window = limits.connection_window
        self._unreturned = 0
        self._return_connection_at = limits.returned_late
        self._goaway_sent: int | None = None
        self._settings_acknowledged = False
        self._round_trip_s = 0.0
        """How long SETTINGS took to be acknowledged."""
        self._started_at = now
        self._heard_at = now
        self._ping_at: float | None = None
        self._drain_at: float | None = None
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

    # --- streams -------------------------------------------------------------------------------------------

    def open(self, owner: StreamOwner, block: bytes) -> Stream:
        """Client: send a request whose encoded header block is ``block``. Raises OurFault unless ``can_open``."""
        if self._role is not Role.CLIENT or not self.can_open:
            raise OurFault("a stream was opened where none may be")
        stream = Stream(self._next_id, owner, self.peer_stream_window, self.limits.stream_window)
        self._next_id += 2
        stream.returned_at = self._heard_at
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

    # --- credit --------------------------------------------------------------------------------------------

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
            if stream.unreturned >= stream.window >> 1:
                self._return(stream)

    def _return(self, stream: Stream) -> None:
        """Credit for what was consumed. A window of which half is gone in `_GROW_S` doubles while there is some to
        spare, and one that lasts for `_SHRINK_S` halves. Over a long way half a window takes half a round trip however
        quickly it is read: there it has two round trips for it."""
        lasted = self._heard_at - stream.returned_at
        stream.returned_at = self._heard_at
        change = 0
        if lasted < max(_GROW_S, 2 * self._round_trip_s):
            change = min(stream.window, self.limits.stream_window_max - stream.window, self._spare)
        elif lasted > _SHRINK_S:
            change = -min(stream.window >> 1, stream.window - self.limits.stream_window)
        stream.window += change
        self._spare -= change
        credit, stream.unreturned = stream.unreturned + change, 0
        if credit:
            self.output.put(frames.window_update(stream.id, credit))
            stream.receive_window += credit

    def _unread(self, count: int) -> None:
        """Credit of the connection for bytes nobody will read."""
        self._unreturned += count
        if self._unreturned >= self._return_connection_at:
            self.output.put(frames.window_update(0, self._unreturned))
            self._receive_window += self._unreturned
            self._unreturned = 0

    # --- the end -------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Once a second or so: timeouts and keepalive."""
        if self.closed:
            return
        if not self._settings_acknowledged and now - self._started_at > self.limits.settings_timeout_s:
            self._fail(Fault(Code.SETTINGS_TIMEOUT, "SETTINGS were not acknowledged in time"))
        elif self._ping_at is not None:
            if now - self._ping_at > self.limits.ping_timeout_s:
                self._fail(Fault(Code.NO_ERROR, "PING was not answered in time"))
        elif now - self._heard_at >= self.limits.ping_interval_s:
            self._ping_at = now
            self.output.put(frames.ping(b"ambient\0", ack=False))
        if self._drain_at is not None and now >= self._drain_at and not self.closed:
            self._drain_at = None
            self._goaway_sent = self._last_peer
            self.output.put(frames.goaway(self._last_peer, Code.NO_ERROR))

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

    def _fail(self, fault: Fault) -> None:
        if self.fault is None:
            self.fault = (fault.code, str(fault))
        self.close(fault.code, str(fault))
