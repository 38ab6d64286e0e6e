"""The streams of a connection: which it has, had and may have, and how each ends."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from ztunnel.core import frames
from ztunnel.core.floods import Bucket
from ztunnel.core.frames import WINDOW_MAX, Code
from ztunnel.core.http2.terms import ConnectionOwner, Fault, Limits, Role
from ztunnel.core.output import Output
from ztunnel.core.streams import DISCARD, Stream

_CLOSED_REMEMBERED: Final = 256


class Lives:
    """Base of `Sending`."""

    __slots__ = (
        "_blocked",
        "_calm_errors",
        "_closed_streams",
        "_last_peer",
        "_next_id",
        "_role",
        "_spare",
        "closed",
        "draining",
        "limits",
        "output",
        "owner",
        "peer_going_away",
        "peer_streams",
        "streams",
    )

    def __init__(self, role: Role, owner: ConnectionOwner, output: Output, limits: Limits) -> None:
        self._role = role
        self.owner = owner
        self.output = output
        self.limits = limits
        self.streams: dict[int, Stream] = {}
        self.closed = False
        self.draining = False
        self.peer_going_away = False
        self.peer_streams = WINDOW_MAX
        self._blocked: dict[int, Stream] = {}
        self._next_id = 1
        self._last_peer = 0
        self._closed_streams: OrderedDict[int, bool] = OrderedDict()
        """The last that ended, and whether we reset them: then the peer may not know yet."""
        self._calm_errors = Bucket(200, 20)
        self._spare = max(0, limits.connection_window - limits.returned_late - limits.streams * limits.stream_window)
        """Credit that no stream needs to begin with: for those that are quick."""

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
        self._spare += stream.window - self.limits.stream_window
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
            raise Fault(Code.ENHANCE_YOUR_CALM, f"too many stream errors, the last: {message}")
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
