"""Settings of the API server: one frozen group, every field with its unit and reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from ambient.lab.apiserver.tokens import User


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """What a cluster's API server is told."""

    service_ranges: tuple[str, ...] = ("10.96.0.0/16", "fd00:10:96::/112")
    """One CIDR per address family; the first is the default family of Services."""
    server_names: tuple[str, ...] = ()
    """DNS names and addresses for the server certificate, beside localhost and the sockets' addresses."""
    advertise: tuple[tuple[str, int], ...] = ()
    """Addresses and ports behind the Service default/kubernetes; empty: no such Service."""
    system_namespaces: tuple[str, ...] = ("kube-system", "ambient-system", "istio-system")
    """Their service accounts may do everything (see `access`)."""
    static_tokens: tuple[tuple[str, User], ...] = ()
    """Bearer tokens beside those this server issues."""
    changes_max: int = 4096
    """Events kept per kind for watches."""
    objects_max: int = 50_000
    watches_max: int = 1000
    bookmark_interval_s: float = 60.0
    write_timeout_s: float = 30.0
    """How long one write to a watcher may take before it is dropped."""
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
