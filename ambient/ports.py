"""The well-known ports of the mesh, in one place (host byte order; Istio ambient's numbers)."""

from __future__ import annotations

from typing import Final

OUTBOUND: Final = 15001  # pod namespace, loopback: captured outbound connections
INBOUND_PLAINTEXT: Final = 15006  # pod namespace, loopback: captured plaintext inbound (by sk_lookup)
HBONE: Final = 15008  # pod namespace, any address: mTLS tunnels
DNS: Final = 15053  # pod namespace, loopback, UDP and TCP: the DNS proxy
ADMIN: Final = 15000  # node namespace, loopback: ztunnel's admin endpoint
METRICS: Final = 15020  # node namespace: /metrics, /stats/prometheus
READINESS: Final = 15021  # node namespace: /healthz/ready
CONTROL: Final = 15012  # control plane: xDS and CA over TLS

GUARDED: Final = frozenset({OUTBOUND, INBOUND_PLAINTEXT, HBONE})
"""An application may not use one of these as a target (recursion guard) nor listen on it while enrolled."""
