"""What the parts of a connection agree on: its two roles, its limits, its owner, and how a peer's mistake is told."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final, Protocol

from ambient.errors import PeerFault
from ztunnel.core.frames import Code
from ztunnel.core.headers import Header
from ztunnel.core.pool import STREAMS_MAX
from ztunnel.core.streams import Stream


class Role(enum.Enum):
    CLIENT = "client"
    SERVER = "server"


@dataclass(frozen=True, slots=True)
class Limits:
    """What we advertise and enforce; most numbers are those of Istio's ztunnel.

    The windows of all streams together never exceed the connection's: readers that stop take nobody's credit. So each
    begins small, and only who is quick gets more, of what the others leave (`Sending._return`).
    """

    stream_window: int = 64 * 1024
    """At first: not less than the 65,535 of a peer that has not read our SETTINGS yet."""
    stream_window_max: int = 4 * 1024 * 1024
    connection_window: int = 24 * 1024 * 1024
    frame_bytes: int = 1024 * 1024
    header_list_bytes: int = 64 * 1024
    """16 KiB for a client, 64 KiB for a server."""
    streams: int = 200
    """Concurrent streams a peer may open (server), or we do (client)."""
    chunk_bytes: int = 128 * 1024
    """Largest DATA frame we send: how long one stream may keep the others waiting."""
    settings_timeout_s: float = 10.0
    ping_interval_s: float = 10.0
    ping_timeout_s: float = 20.0
    drain_pause_s: float = 1.0
    """Between the first GOAWAY and the one that names the last stream."""

    @property
    def returned_late(self) -> int:
        """The connection's credit is returned in steps of so much."""
        return self.connection_window >> 3


CLIENT_LIMITS: Final = Limits(header_list_bytes=16 * 1024, streams=STREAMS_MAX)
SERVER_LIMITS: Final = Limits()


class ConnectionOwner(Protocol):
    """Who owns the connection."""

    def request(self, stream: Stream, fields: list[Header]) -> None:
        """Server: a well-formed request. Sets ``stream.owner``."""

    def going_away(self) -> None:
        """The peer sent GOAWAY: open no more streams here."""


class Fault(PeerFault):
    """The peer broke a rule, or exceeded what it may cause: the connection ends with GOAWAY and this code."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
