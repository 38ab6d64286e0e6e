"""An HTTP/2 connection, client or server (RFC 9113), as far as CONNECT tunnels need it, and strict in that.

Bytes go in by `Connection.receive`, frames come out in `Connection.output`; there is no socket and no clock
here. DATA has a path of its own: payloads are handed to the stream's owner as they arrive, never collected,
and leave by `reserve` and `commit`, which let the caller receive straight into the output buffer.

Whatever a peer may cause is bounded: frame sizes before anything is kept, header blocks, streams, credit, and
by token buckets everything that costs us more than it costs the peer (`ztunnel.core.floods`). A peer that
breaks a rule gets GOAWAY or RST_STREAM with the RFC's code; afterwards nothing it sends is looked at.

Four classes, each the base of the next, so that a connection is one object and its parts cost nothing to reach: `Lives`
of its streams, `Sending`, `Answers` to the peer's frames, and `Connection`, which reads these.
"""

from ztunnel.core.http2.connection import Connection
from ztunnel.core.http2.sending import FULL
from ztunnel.core.http2.terms import CLIENT_LIMITS, SERVER_LIMITS, ConnectionOwner, Limits, Role

__all__ = ["CLIENT_LIMITS", "FULL", "SERVER_LIMITS", "Connection", "ConnectionOwner", "Limits", "Role"]
