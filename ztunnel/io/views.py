"""A certificate and a connection as the admin endpoint shows them, in the words of Istio's ztunnel."""

from __future__ import annotations

import base64
import contextlib
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from ambient.model.world import World
from ztunnel.core import messages
from ztunnel.core.attributes import describe
from ztunnel.core.dump import Json
from ztunnel.core.local import Local


def connection(world: World | None, local: Local, row: messages.ConnectionEvent) -> Json:
    outbound = row.reporter == "source"
    ends = describe(world, local, row)
    ours, theirs = (ends.source, ends.destination) if outbound else (ends.destination, ends.source)
    return {
        "workload": f"{ours.namespace}/{ours.name}" if ours.name else row.local,
        "direction": "Outbound" if outbound else "Inbound",
        "local": row.source_address if outbound else row.destination_address,
        "remote": row.destination_address if outbound else row.source_address,
        "remoteTarget": (ends.service_host or row.original) if outbound else "",
        "protocol": row.protocol.upper(),
        "remoteWorkload": f"{theirs.namespace}/{theirs.name}" if theirs.name else "",
        "original": row.original,
        "service": ends.service_host,
        "sourceIdentity": row.source_identity,
        "destinationIdentity": row.destination_identity,
        "bytesSent": row.sent,
        "bytesReceived": row.received,
        "durationMs": round(row.duration_ms, 3),
        "policy": row.policy,
    }


def certificate(identity: str, held: messages.Certificate | None, error: str) -> Json:
    if held is None:
        state = f"Unavailable: {error}" if error else "Initializing"
        return {"identity": identity, "state": state, "certChain": [], "rootCerts": []}
    return {
        "identity": identity,
        "state": "Available",
        "error": error,
        "certChain": _pem(held.chain_pem),
        "rootCerts": _pem(held.roots_pem),
    }


def _pem(pem: bytes) -> list[Json]:
    found: list[Json] = []
    with contextlib.suppress(ValueError):
        for one in x509.load_pem_x509_certificates(pem):
            found.append(
                {
                    "pem": base64.b64encode(one.public_bytes(Encoding.PEM)).decode(),
                    "serialNumber": str(one.serial_number),
                    "validFrom": _rfc3339(one.not_valid_before_utc),
                    "expirationTime": _rfc3339(one.not_valid_after_utc),
                }
            )
    return found


def _rfc3339(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
