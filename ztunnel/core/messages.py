"""What ztunnel's workers and its control process say to each other.

One unix stream per worker; each message is a 4-byte big-endian length and a msgpack tagged struct. Only the
control process holds the World and metrics, and asks for certificates. A worker asks on a miss and caches the answer;
the control process remembers what it answered, decides again whenever the World changes, and pushes what changed. A
worker that is told of a changed `Verdict` closes the connections that lost their right.

Addresses are text in canonical form, ports are ints in host order; identities are SPIFFE IDs.
"""

from __future__ import annotations

from typing import Final

import msgspec

MESSAGE_BYTES_MAX: Final = 16 * 1024 * 1024
HOLD_S: Final = 10.0
"""How long a question waits for the first World before it is answered with reason ``not_synced``."""
ORPHAN_S: Final = 5.0
"""How long children whose parent died go on accepting: by then the next ztunnel serves the same listeners."""


class AskRoute(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Where does a captured connection of a workload go? Answered by one Route with the same key."""

    source: str
    """Pod UID whose listener accepted the connection."""
    ip: str
    port: int


class Hop(msgspec.Struct, frozen=True, kw_only=True):
    """One way to reach the destination; a worker picks at random by weight."""

    ip: str
    port: int
    """Where to connect: the peer's :15008 for HBONE, the endpoint itself for TCP."""
    authority: str = ""
    """CONNECT :authority, for HBONE. Empty: this hop is plain TCP, also in a route of kind hbone (while a
    service's pods are being enrolled some are reached by a tunnel and some are not)."""
    identities: tuple[str, ...] = ()
    """SPIFFE IDs of which the peer must prove one, for HBONE; never empty there."""
    destination: str = ""
    """WDS uid of the destination workload; empty if unknown."""
    endpoint: str = ""
    """ADDRESS:PORT of the endpoint, to recognise the hook's choice."""
    weight: int = 1


class Route(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    source: str
    ip: str
    port: int
    generation: int
    """Grows with every decision, also across restarts of the control process."""
    kind: str
    """hbone (at least one hop is), tcp (no hop is), or refused"""
    hops: tuple[Hop, ...] = ()
    service: str = ""
    """namespace/hostname if the destination is a service."""
    identity: str = ""
    """The source's own SPIFFE ID, for which the worker needs a certificate (hbone)."""
    baggage: str = ""
    reason: str = ""
    """Why it is refused: not_synced, unknown_source, unknown_destination, no_endpoint, recursion, ..."""
    message: str = ""
    """For the operator."""


class AskVerdict(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """May this peer reach a port of a local workload? Answered by one Verdict with the same key."""

    destination: str
    """Pod UID."""
    destination_ip: str
    port: int
    identity: str = ""
    """The peer's proved SPIFFE ID; empty for plaintext."""
    source_ip: str = ""


class Verdict(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    destination: str
    destination_ip: str
    port: int
    identity: str
    source_ip: str
    """Empty if the verdict does not depend on it: then it holds for every source address."""
    generation: int
    allow: bool
    policy: str = ""
    """namespace/name of the policy that decided; empty for the default."""
    reason: str = ""
    """policy, strict, default_deny, not_synced, unknown_destination, ..."""


class Forget(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Worker -> control: nothing of this worker uses the key any more (cache eviction)."""

    routes: tuple[tuple[str, str, int], ...] = ()
    verdicts: tuple[tuple[str, str, int, str, str], ...] = ()


class AskCertificate(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    identity: str


class Certificate(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Pushed again on renewal and when the trust bundle changes. ``error`` set: there is none (yet)."""

    identity: str
    generation: int
    chain_pem: bytes = b""
    key_pem: bytes = b""
    roots_pem: bytes = b""
    not_before: int = 0
    not_after: int = 0
    """Seconds since the epoch."""
    error: str = ""


class ConnectionEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the access log and one set of metric updates. Sent within a second of the opening unless the
    connection is over by then (at once where openings are logged), each second if bytes moved, and at close: a
    closed connection of which nothing was heard before was opened, too. Byte counts are deltas since the last event."""

    connection: int
    """Unique in the worker."""
    event: str
    """opened, progress, closed, failed, denied"""
    reporter: str
    """source or destination"""
    local: str
    """Pod UID of the workload this ztunnel serves."""
    source_address: str
    destination_address: str
    hbone_address: str = ""
    original: str = ""
    """ADDRESS:PORT the application asked for (source side)."""
    service: str = ""
    destination: str = ""
    """WDS uid of the destination workload, when this is the source side."""
    source_identity: str = ""
    destination_identity: str = ""
    protocol: str = ""
    """hbone or tcp: what this side of the connection travels in; kernel: ztunnel is not on its way."""
    sent: int = 0
    received: int = 0
    """As Istio counts them: bytes sent to and received from the destination."""
    duration_ms: float = 0.0
    flags: str = "-"
    """Istio's response_flags."""
    policy: str = ""
    error: str = ""
    at: float = 0.0
    """Seconds since the epoch."""


class Events(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A batch, at most each second or 256 events; ``counters`` are deltas of the worker's own counters."""

    events: tuple[ConnectionEvent, ...] = ()
    counters: dict[str, int] = {}


class AskConnections(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Control -> worker: list what is open. Answered by Connections with the same number."""

    number: int


class Connections(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    number: int
    rows: tuple[ConnectionEvent, ...]
    tunnels: tuple[dict[str, str | int], ...] = ()


class LogLevel(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    level: str


class Synced(msgspec.Struct, frozen=True, tag=True):
    """Control -> worker when verdicts come to depend on the source address: every question
    must be asked again, verdicts once per open connection with its real source address. An answer replaces
    what is cached; a verdict cached for every source address goes when one for a single address comes."""


class ControlChannel(msgspec.Struct, frozen=True, tag=True):
    """Parent -> worker on the packet socket that also carries PodPut, with one descriptor beside it: the
    worker's end of a new stream, because the control process was restarted. The worker drops the old stream
    and asks again for everything it holds; what it has cached stays valid meanwhile."""


class WorkerChannel(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Parent -> control process on its packet socket, with one descriptor beside it: the control process's end
    of the stream to a worker. A number given again replaces the stream of the worker that had it."""

    number: int
    pid: int


class Draining(msgspec.Struct, frozen=True, tag=True):
    """Parent -> control process on its packet socket: the workers were told to end (SIGTERM); not ready any more."""


Message = (
    AskRoute
    | Route
    | AskVerdict
    | Verdict
    | Forget
    | AskCertificate
    | Certificate
    | Events
    | AskConnections
    | Connections
    | LogLevel
    | Synced
)
