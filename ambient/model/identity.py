"""SPIFFE identities of workloads: ``spiffe://<trust domain>/ns/<namespace>/sa/<service account>``.

Comparison is exact and case-sensitive, as SPIFFE demands; nothing is normalised. Anything that is not of
this very form is no identity (`Identity.parse` raises), and an unknown identity is refused by its users.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

DEFAULT_TRUST_DOMAIN = "cluster.local"

_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}")
_SEGMENT = re.compile(r"[A-Za-z0-9._-]{1,253}")
_URI = re.compile(r"spiffe://([^/]+)/ns/([^/]+)/sa/([^/]+)")
_URI_BYTES_MAX = 2048  # SPIFFE ID specification, section 2.3


@dataclass(frozen=True, slots=True, order=True)
class Identity:
    """Who a workload is. ``str()`` gives the SPIFFE ID."""

    trust_domain: str
    namespace: str
    service_account: str

    def __post_init__(self) -> None:
        if not _TRUST_DOMAIN.fullmatch(self.trust_domain):
            raise ValueError(f"{self.trust_domain!r} is not a SPIFFE trust domain")
        for name, value in (("namespace", self.namespace), ("service account", self.service_account)):
            if not _SEGMENT.fullmatch(value) or value in (".", ".."):
                raise ValueError(f"{value!r} is not a {name} of a SPIFFE ID")

    def __str__(self) -> str:
        return f"spiffe://{self.principal}"

    @property
    def principal(self) -> str:
        """The form AuthorizationPolicy uses: the SPIFFE ID without ``spiffe://``."""
        return f"{self.trust_domain}/ns/{self.namespace}/sa/{self.service_account}"

    @staticmethod
    def parse(uri: str) -> Identity:
        """Parse a SPIFFE ID of a workload. Raises ValueError naming the text."""
        match = _URI.fullmatch(uri) if len(uri) <= _URI_BYTES_MAX else None
        if match is None:
            raise ValueError(f"{uri[:200]!r} is not spiffe://<trust domain>/ns/<namespace>/sa/<service account>")
        return Identity(*match.groups())
