"""One HTTP/2 stream and what its owner is told."""

from __future__ import annotations

from typing import Protocol

from ztunnel.core.headers import Header


class StreamOwner(Protocol):
    """Who carries the bytes of a stream. Called while the connection reads; may call the connection back."""

    def stream_headers(self, fields: list[Header]) -> None:
        """Client: the response. Never called on a server."""

    def stream_data(self, data: memoryview) -> None:
        """Bytes that are valid during this call only. Every byte must be given back once by
        `Connection.consumed`, when the application took it."""

    def stream_end(self) -> None:
        """The peer sends no more."""

    def stream_reset(self, code: int) -> None:
        """The stream is gone, by RST_STREAM, GOAWAY or the end of the connection."""

    def stream_writable(self) -> None:
        """There is credit again after `Connection.reserve` had returned None."""


class Discard:
    """The owner of a stream nobody carries (any more)."""

    def stream_headers(self, fields: list[Header]) -> None:
        pass

    def stream_data(self, data: memoryview) -> None:
        pass

    def stream_end(self) -> None:
        pass

    def stream_reset(self, code: int) -> None:
        pass

    def stream_writable(self) -> None:
        pass


DISCARD = Discard()


class Stream:
    """State of one stream; only the connection writes to it, except ``owner``, set by who opens or accepts it."""

    __slots__ = (
        "answered",
        "blocked",
        "dead",
        "id",
        "local_open",
        "owner",
        "receive_window",
        "receiving",
        "remote_open",
        "returned_at",
        "send_window",
        "unreturned",
        "window",
    )

    def __init__(self, identifier: int, owner: StreamOwner, send_window: int, receive_window: int) -> None:
        self.id = identifier
        self.owner = owner
        self.send_window = send_window
        self.receive_window = self.window = receive_window
        """What the peer may still send; and that with what is here and was not returned to it."""
        self.returned_at = 0.0
        self.unreturned = 0
        """Bytes consumed but not yet returned to the peer as credit."""
        self.local_open = True
        self.remote_open = True
        self.receiving = False
        """DATA may come: the peer sent HEADERS and not yet END_STREAM."""
        self.answered = False
        """Server: we sent the response; client: we received it."""
        self.blocked = False
        """`Connection.reserve` found no credit and the owner has not been told of any since."""
        self.dead = False
        """Removed from its connection."""
