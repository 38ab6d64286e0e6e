"""HBONE: the CONNECT that opens a tunnel stream, built and read, and its answers, as Istio's ztunnel has them.

The part of a request's header block that is the same for all connections to one destination is encoded once
and kept by `Requests`; only `forwarded` and `traceparent` are added for each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, NamedTuple

from ambient import ports
from ambient.model.address import SocketAddress
from ztunnel.core.headers import FORWARDED_START, STATUS_200, Header, encode

OK: Final = 200
BAD_REQUEST: Final = 400
DENIED: Final = 401
UNAVAILABLE: Final = 503

_PREFIXES_MAX: Final = 4096
_FORWARDED = re.compile(rb'(?:^|[;,]\s*)for="?(\[[0-9a-fA-F:.]+\]|[0-9.]+):([0-9]{1,5})"?', re.IGNORECASE)
_AUTHORITIES_MAX: Final = 4096
_AUTHORITY_BYTES_MAX: Final = 64
"""More than the longest ADDRESS:PORT; what is longer is neither read nor kept."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that is answered with ``status`` and nothing else."""

    status: int
    reason: str


class Connect(NamedTuple):
    """A CONNECT that may go on to be authorized."""

    ip: str
    port: int
    client_ip: str = ""
    client_port: int = 0
    """Who the sender says it forwards for; a claim, never an identity."""
    traceparent: str = ""


class Requests:
    """Header blocks of requests; the constant part is kept per destination."""

    __slots__ = ("_prefixes",)

    def __init__(self) -> None:
        self._prefixes: dict[tuple[str, str], bytes] = {}

    def block(self, authority: str, baggage: str, client: str, trace: int) -> bytes:
        """``client``: ADDRESS:PORT of the application's socket; ``trace``: 192 random bits."""
        prefix = self._prefixes.get((authority, baggage))
        if prefix is None:
            fields: list[Header] = [(b":method", b"CONNECT"), (b":authority", authority.encode())]
            if baggage:
                fields.append((b"baggage", baggage.encode()))
            prefix = encode(fields)
            if len(self._prefixes) >= _PREFIXES_MAX:
                self._prefixes.clear()
            self._prefixes[authority, baggage] = prefix
        text = f"{trace:048x}"
        forwarded = b'for="%s"' % client.encode()
        # Literals without indexing, lengths below 127: see ztunnel.core.headers.encode.
        return b"%s%s%c%s\x00\x0btraceparent\x3700-%s-%s-01" % (
            prefix,
            FORWARDED_START,
            len(forwarded),
            forwarded,
            text[:32].encode(),
            text[32:].encode(),
        )


def response(status: int) -> bytes:
    """The header block of an answer."""
    return STATUS_200 if status == OK else encode([(b":status", b"%d" % status)])


def read_status(fields: list[Header]) -> int:
    """The status of a well-formed response."""
    return int(fields[0][1])


class Authorities:
    """Parsed :authority texts, kept: a destination has few of them."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[bytes, SocketAddress | None] = {}

    def parse(self, text: bytes) -> SocketAddress | None:
        """None if it is no ADDRESS:PORT."""
        if len(text) > _AUTHORITY_BYTES_MAX:
            return None
        try:
            return self._known[text]
        except KeyError:
            pass
        try:
            address = SocketAddress.parse(text.decode("ascii"))
        except ValueError:
            address = None
        if len(self._known) >= _AUTHORITIES_MAX:
            self._known.clear()
        self._known[text] = address
        return address


def read_connect(fields: list[Header], local_ip: str, authorities: Authorities) -> Connect | Refused:
    """Check a well-formed request that came to ``local_ip``, the address the tunnel was opened to."""
    values = dict(fields)
    if values.get(b":method") != b"CONNECT" or b":protocol" in values:
        return Refused(BAD_REQUEST, "not CONNECT")
    address = authorities.parse(values[b":authority"])
    if address is None or not address.port:
        return Refused(BAD_REQUEST, ":authority is not ADDRESS:PORT")
    ip = str(address.ip)
    if ip != local_ip:
        return Refused(BAD_REQUEST, f"the destination {ip} is not {local_ip}")
    if address.port in ports.GUARDED:
        return Refused(BAD_REQUEST, f"port {address.port} belongs to the mesh")
    client_ip, client_port = read_forwarded(values.get(b"forwarded", b""))
    return Connect(ip, address.port, client_ip, client_port, values.get(b"traceparent", b"").decode("latin-1")[:64])


def read_forwarded(value: bytes) -> tuple[str, int]:
    """The first ``for="ADDRESS:PORT"`` of a Forwarded field as written; empty and 0 if there is none."""
    match = _FORWARDED.search(value[:1024])
    if match is None:
        return "", 0
    port = int(match[2])
    return (match[1].decode().strip("[]"), port) if 0 < port < 65536 else ("", 0)
