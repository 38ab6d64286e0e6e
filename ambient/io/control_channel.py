"""Connections of a node to its control plane: TLS, the bearer token, time limits.

Root bundle and token are read again for every connection, so a rotation of either needs no restart. The
files are the only secrets read here and nothing of them is ever logged.
"""

from __future__ import annotations

from pathlib import Path

from ambient.errors import ConfigFault
from ambient.io.quiet_grpc import grpc
from ambient.settings import NodeSettings

RECEIVE_BYTES_MAX = 200 * 1024 * 1024  # Istio's limit
TOKEN_BYTES_MAX = 64 * 1024
ROOTS_BYTES_MAX = 1024 * 1024

ACCEPTED = "x-ambient-accepted"
"""Response header of a discovery stream whose caller was authenticated."""

_OPTIONS = (
    ("grpc.max_receive_message_length", RECEIVE_BYTES_MAX),
    ("grpc.max_send_message_length", RECEIVE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),  # else a new channel could inherit a connection made with old roots
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),  # reconnecting is decided here, by one backoff
)


def open_channel(settings: NodeSettings) -> grpc.aio.Channel:
    """A channel that checks the control plane's certificate against the root file, right now.

    Raises ConfigFault if the root file cannot be read or holds no certificate.
    """
    roots = _read(Path(settings.ca_root_file), "ca_root_file", ROOTS_BYTES_MAX)
    if b"-----BEGIN CERTIFICATE-----" not in roots:
        raise ConfigFault("ca_root_file", settings.ca_root_file, "holds no PEM certificate")
    credentials = grpc.ssl_channel_credentials(root_certificates=roots)
    options = (*_OPTIONS, ("grpc.ssl_target_name_override", settings.control_server_name))
    return grpc.aio.secure_channel(settings.control_address, credentials, options=options)


def bearer(settings: NodeSettings) -> tuple[tuple[str, str], ...]:
    """Metadata of a call: the token as it is in the file now, and the cluster's name."""
    token = _read(Path(settings.token_file), "token_file", TOKEN_BYTES_MAX).strip()
    if not token or not token.isascii() or any(byte <= 0x20 for byte in token):
        raise ConfigFault("token_file", settings.token_file, "must hold one token and nothing else")
    return (("authorization", f"Bearer {token.decode('ascii')}"), ("clusterid", settings.cluster_id))


def _read(path: Path, field: str, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ConfigFault(field, str(path), f"cannot be read: {error.strerror}") from None
    if len(data) > limit:
        raise ConfigFault(field, str(path), f"is larger than {limit} bytes")
    return data


def describe(error: grpc.aio.AioRpcError) -> str:
    """One line for logs: status, reason, nothing secret."""
    return f"{error.code().name}: {(error.details() or '')[:500]}"
