"""The few names every translation needs, and the label and annotation words of the API (Istio's)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

DATAPLANE_MODE: Final = "istio.io/dataplane-mode"  # label: ambient or none
REDIRECTION: Final = "ambient.istio.io/redirection"  # annotation, written by the node agent: enabled
SIDECAR_STATUS: Final = "sidecar.istio.io/status"  # annotation: an injected sidecar
DRY_RUN: Final = "istio.io/dry-run"  # annotation of AuthorizationPolicy
TUNNEL: Final = "networking.istio.io/tunnel"  # label: http where the application itself speaks HBONE
TRAFFIC_DISTRIBUTION: Final = "networking.istio.io/traffic-distribution"  # annotation of Service
SERVICE_NAME: Final = "kubernetes.io/service-name"  # label of EndpointSlice

STATIC_STRICT: Final = "istio_converted_static_strict"
PORT_LEVEL_PREFIX: Final = "converted_peer_authentication_"
"""Names of the policies PeerAuthentication becomes. The underscores keep them apart from objects' names."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """``root_namespace`` holds the policies of the whole mesh; ``cluster_domain`` is the DNS suffix of services."""

    trust_domain: str = "cluster.local"
    cluster_id: str = "Kubernetes"
    cluster_domain: str = "cluster.local"
    root_namespace: str = "istio-system"
