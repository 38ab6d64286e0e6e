"""Ask the control plane for certificates, and check what it answers.

Trust: peers are verified against the roots that came with the certificate (last element of the chain) and
those in ``ca_root_file``, together (`trust_bundle`). The two overlap except while the mesh's root is being
rotated: whichever brings the new root first, it is trusted from then on, and the old one until both have
dropped it. Therefore ``ca_root_file`` holds the mesh's own roots and no others.
"""

from __future__ import annotations

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ambient.errors import PeerFault
from ambient.io.control_channel import bearer, describe, open_channel
from ambient.io.quiet_grpc import grpc
from ambient.model.identity import Identity
from ambient.proto import ca_pb2
from ambient.settings import NodeSettings

CREATE_CERTIFICATE = "/istio.v1.auth.IstioCertificateService/CreateCertificate"
TIMEOUT_S = 10.0
CHAIN_MAX = 16


def make_key() -> ec.EllipticCurvePrivateKey:
    """A fresh P-256 key for a workload certificate."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS#8 PEM, as ssl.SSLContext.load_cert_chain reads it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def make_csr(key: ec.EllipticCurvePrivateKey, identity: str) -> str:
    """PEM signing request with only the URI SAN, as Istio's ztunnel sends."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    builder = builder.add_extension(
        x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity)]), critical=True
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode("ascii")


async def create_certificate(settings: NodeSettings, identity: str, csr_pem: str, ttl_s: int) -> tuple[str, ...]:
    """Ask for a certificate of ``identity``, a SPIFFE ID.

    The answer is PEM: the leaf first, intermediates, and last ONE element with all roots of the mesh
    concatenated (usually one). Raises PeerFault with the control plane's reason, also if the answer is for
    another identity, another key or unreadable.
    """
    request = ca_pb2.IstioCertificateRequest(csr=csr_pem, validity_duration=ttl_s)
    request.metadata.update({"ImpersonatedIdentity": identity})
    try:
        async with open_channel(settings) as channel:
            call = channel.unary_unary(
                CREATE_CERTIFICATE,
                request_serializer=ca_pb2.IstioCertificateRequest.SerializeToString,
                response_deserializer=ca_pb2.IstioCertificateResponse.FromString,
            )
            response = await call(request, metadata=bearer(settings), timeout=TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        raise PeerFault(f"certificate of {identity}: {describe(error)}") from None
    if not isinstance(response, ca_pb2.IstioCertificateResponse):
        raise PeerFault(f"certificate of {identity}: the answer is no such message")  # the library gives None
    chain = tuple(response.cert_chain)
    check_chain(chain, identity, csr_pem)
    return chain


def check_chain(chain: tuple[str, ...], identity: str, csr_pem: str) -> None:
    """Refuse (PeerFault) an answer that is not a certificate of this identity for this key."""
    if not 2 <= len(chain) <= CHAIN_MAX:
        raise PeerFault(f"certificate of {identity}: the chain has {len(chain)} elements, not 2 to {CHAIN_MAX}")
    try:
        leaf = x509.load_pem_x509_certificate(chain[0].encode())
        for element in chain[1:]:
            x509.load_pem_x509_certificates(element.encode())
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        wanted = x509.load_pem_x509_csr(csr_pem.encode()).public_key()
        proved = leaf.public_key()
    except (ValueError, x509.ExtensionNotFound) as error:
        raise PeerFault(f"certificate of {identity}: unreadable answer: {error}") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if uris != [identity] or len(names) != 1:
        raise PeerFault(f"certificate of {identity}: the answer is for {', '.join(map(str, names))[:500]}")
    if not isinstance(proved, ec.EllipticCurvePublicKey) or proved != wanted:
        raise PeerFault(f"certificate of {identity}: the answer is for another key")
    Identity.parse(identity)


def trust_bundle(settings: NodeSettings, chain: tuple[str, ...]) -> bytes:
    """PEM of every root a peer may chain to: those of the chain's last element and of ``ca_root_file``.

    Duplicates are dropped and the order is stable, so equal bundles are equal bytes. An unreadable root
    file leaves those of the chain.
    """
    texts = [chain[-1].encode()]
    try:
        texts.append(Path(settings.ca_root_file).read_bytes())
    except OSError:
        pass  # the chain's own roots serve; opening the next connection will name the file
    found: dict[bytes, None] = {}
    for text in texts:
        try:
            certificates = x509.load_pem_x509_certificates(text)
        except ValueError:
            continue
        for certificate in certificates:
            found[certificate.public_bytes(serialization.Encoding.PEM)] = None
    return b"".join(sorted(found))
