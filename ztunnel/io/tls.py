"""TLS of the tunnels: contexts out of certificates that never touch a disk, and who the peer is.

TLS 1.3 only, AES-GCM only, ALPN h2 only, certificates on both sides, no resumption. The chain is verified by
OpenSSL; the identity is read from the leaf by `ztunnel.core.certificate`. A renewed certificate makes new
contexts; tunnels that are open keep theirs, and take no new streams once their peer's has expired.
"""

from __future__ import annotations

import os
import ssl
from typing import Final

from ambient.errors import PeerFault, PlatformFault
from ambient.model.identity import Identity
from ztunnel.core.certificate import CertificateFault, peer_identity
from ztunnel.core.messages import Certificate

CIPHERS: Final = frozenset({"TLS_AES_256_GCM_SHA384", "TLS_AES_128_GCM_SHA256"})


class TlsRefused(PeerFault):
    """The handshake was completed with somebody we do not talk to, or not in a way we allow."""


class Credential:
    """Contexts of one identity, made of one Certificate. Raises PlatformFault if OpenSSL refuses it."""

    __slots__ = ("client", "generation", "identity", "not_after", "server")

    def __init__(self, certificate: Certificate) -> None:
        self.identity = Identity.parse(certificate.identity)
        self.generation = certificate.generation
        self.not_after = certificate.not_after
        try:
            self.server = _context(ssl.PROTOCOL_TLS_SERVER, certificate)
            self.client = _context(ssl.PROTOCOL_TLS_CLIENT, certificate)
        except (ssl.SSLError, OSError, ValueError) as error:
            raise PlatformFault(f"certificate of {certificate.identity}: {error}") from None


def _context(protocol: int, certificate: Certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the name is a URI, checked after the handshake
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    context.load_verify_locations(cadata=certificate.roots_pem.decode("ascii"))
    fd = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        os.write(fd, certificate.chain_pem.rstrip() + b"\n" + certificate.key_pem)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    return context


def _check_session(tls: ssl.SSLObject) -> Identity:
    cipher = tls.cipher()
    if tls.version() != "TLSv1.3" or cipher is None or cipher[0] not in CIPHERS:
        raise TlsRefused(f"the peer chose {tls.version()} with {cipher and cipher[0]}: TLS 1.3 with AES-GCM is needed")
    if tls.selected_alpn_protocol() != "h2":
        raise TlsRefused("the peer does not speak h2 (ALPN)")
    der = tls.getpeercert(binary_form=True)
    if der is None:
        raise TlsRefused("the peer has no certificate")
    try:
        return peer_identity(der)
    except CertificateFault as fault:
        raise TlsRefused(str(fault)) from None


def peer_expiry(tls: ssl.SSLObject) -> float:
    """When the peer's verified certificate expires, in seconds since the epoch. Raises TlsRefused."""
    try:
        found = tls.getpeercert()
        return float(ssl.cert_time_to_seconds(str(found["notAfter"]))) if found else 0.0
    except (KeyError, ValueError) as error:
        raise TlsRefused(f"the peer's certificate does not say when it expires: {error}") from None


def check_client(tls: ssl.SSLObject, own: Identity) -> Identity:
    """Server: who the client is. Raises TlsRefused, also for another trust domain than our own."""
    identity = _check_session(tls)
    if identity.trust_domain != own.trust_domain:
        raise TlsRefused(f"{identity} is not of the trust domain {own.trust_domain}")
    return identity


def check_server(tls: ssl.SSLObject, expected: tuple[str, ...]) -> Identity:
    """Client: who the server is. Raises TlsRefused unless it is one of ``expected``."""
    identity = _check_session(tls)
    if str(identity) not in expected:
        raise TlsRefused(f"the peer is {identity}, expected {' or '.join(expected) or 'nobody'}")
    return identity
