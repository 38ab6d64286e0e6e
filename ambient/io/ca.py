"""The certificate authority: issues leaves for decisions that `ambient.control.certificates` made.

Only the public key of a signing request is used. Names, life and usage come from the decision, so nothing a
caller writes into its request can reach the certificate.

    python -m ambient.io.ca rotate --data-dir D     begin to replace the root; the running CA does the rest
    python -m ambient.io.ca status --data-dir D
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from ambient.control.certificates import Validity, validity
from ambient.control.rotation import Timing, remaining_s
from ambient.errors import AmbientError, ConfigFault, OurFault, PeerFault
from ambient.io.ca_chain import RSA_BITS_MAX, RSA_BITS_MIN, Issuer, UserFiles
from ambient.io.ca_files import RootDirectory, key_usage, pem, serial_number
from ambient.model.identity import Identity
from ambient.settings import ControlSettings

CSR_BYTES_MAX = 16 * 1024
SERVER_LIFE_S = 86400

LeafKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Issued:
    """``chain`` as the CA's answer has it: leaf, intermediates, and last all trusted roots in one element."""

    chain: tuple[str, ...]
    life: Validity
    serial: int


@dataclass(frozen=True, slots=True)
class ServerCertificate:
    """PEM of our own server's key and chain (without the root)."""

    key_pem: bytes
    chain_pem: bytes
    life: Validity


class Authority:
    """Make with `Authority.open`; call `poll` every few seconds."""

    def __init__(self, source: RootDirectory | UserFiles, issuer: Issuer, ttl_max_s: int) -> None:
        self._source = source
        self._issuer = issuer
        self._ttl_max_s = ttl_max_s
        self._signature = source.signature()
        self._listeners: list[Callable[[], None]] = []
        self._fault = ""

    @staticmethod
    def open(settings: ControlSettings, now: float) -> Authority:
        """The authority the settings describe. Raises ConfigFault, PlatformFault or OurFault: without a signing
        key there is no control plane."""
        files = {name: getattr(settings, name) for name in ("root_cert_file", "root_key_file", "root_bundle_file")}
        source: RootDirectory | UserFiles
        if any(files.values()):
            for name, value in files.items():
                if not value:
                    raise ConfigFault(name, value, "root_cert_file, root_key_file and root_bundle_file go together")
            source = UserFiles(*(Path(value) for value in files.values()))
        else:
            source = RootDirectory(Path(settings.data_dir), settings.trust_domain)
        issuer = source.load(now)
        if isinstance(source, RootDirectory):
            source.keep_lifetime(settings.secret_ttl_max_s)
        return Authority(source, issuer, settings.secret_ttl_max_s)

    @property
    def bundle_pem(self) -> str:
        """All roots that are trusted now."""
        return "".join(pem(root) for root in self._issuer.roots)

    def poll(self, now: float) -> bool:
        """Take over what changed on disk and move a rotation on; whether signer or roots changed.

        Files that are wrong are reported once and the last good ones serve.
        """
        try:
            if isinstance(self._source, RootDirectory):
                self._source.tick(now)
            signature = self._source.signature()
            if signature == self._signature:
                return False
            issuer = self._source.load(now)
        except AmbientError as error:
            if str(error) != self._fault:
                self._fault = str(error)
                _log.error("the CA keeps its present keys: %s", error)
            return False
        self._signature, self._fault = signature, ""
        changed = (issuer.certificate, issuer.chain, issuer.roots) != (
            self._issuer.certificate,
            self._issuer.chain,
            self._issuer.roots,
        )
        self._issuer = issuer
        if changed:
            _log.warning(
                "the CA now signs as %s and trusts %d roots",
                issuer.certificate.subject.rfc4514_string(),
                len(issuer.roots),
            )
            for listener in tuple(self._listeners):
                listener()
        return changed

    def listen(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` when the signer or the roots have changed."""
        self._listeners.append(listener)

    def issue(self, key: LeafKey, identity: Identity, ttl_s: int, now: float) -> Issued:
        """A workload's certificate. Raises OurFault if the signing certificate is about to expire."""
        name = x509.UniformResourceIdentifier(str(identity))
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        leaf, life = self._sign(key, [name], usages, ttl_s, self._ttl_max_s, now)
        chain = (pem(leaf), *(pem(certificate) for certificate in self._issuer.chain), self.bundle_pem)
        return Issued(chain, life, leaf.serial_number)

    def issue_server(self, names: Sequence[str], now: float) -> ServerCertificate:
        """A certificate for our own server under these DNS names and IP addresses, with a fresh key."""
        key = ec.generate_private_key(ec.SECP256R1())
        general = [_general_name(name) for name in names]
        usages = [ExtendedKeyUsageOID.SERVER_AUTH]
        leaf, life = self._sign(key.public_key(), general, usages, SERVER_LIFE_S, SERVER_LIFE_S, now)
        chain = pem(leaf) + "".join(pem(certificate) for certificate in self._issuer.chain)
        text = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return ServerCertificate(text, chain.encode(), life)

    def _sign(
        self,
        key: LeafKey,
        names: Sequence[x509.GeneralName],
        usages: list[x509.ObjectIdentifier],
        ttl_s: int,
        limit_s: int,
        now: float,
    ) -> tuple[x509.Certificate, Validity]:
        issuer = self._issuer.certificate
        bounds = Validity(
            int(issuer.not_valid_before_utc.timestamp()),
            min(int(c.not_valid_after_utc.timestamp()) for c in (issuer, *self._issuer.chain)),
        )
        life = validity(now, ttl_s, limit_s, bounds)
        if life is None:
            raise OurFault(
                f"the signing certificate {issuer.subject.rfc4514_string()} is valid from"
                f" {issuer.not_valid_before_utc:%Y-%m-%d %H:%M} to {issuer.not_valid_after_utc:%Y-%m-%d %H:%M} UTC:"
                " nothing can be signed; renew it"
            )
        leaf = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(issuer.subject)
            .public_key(key)
            .serial_number(serial_number())
            .not_valid_before(datetime.datetime.fromtimestamp(life.not_before, datetime.UTC))
            .not_valid_after(datetime.datetime.fromtimestamp(life.not_after, datetime.UTC))
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(_authority_key(issuer), critical=False)
            .sign(self._issuer.key, _hash(self._issuer.key))
        )
        return leaf, life


def _authority_key(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    try:
        subject_key = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key())  # type: ignore[arg-type]
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(subject_key)


def _hash(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> hashes.SHA256 | hashes.SHA384 | hashes.SHA512:
    """As long as the curve is strong; SHA-256 for RSA."""
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.key_size > 256:
        return hashes.SHA384() if key.curve.key_size == 384 else hashes.SHA512()
    return hashes.SHA256()


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def read_csr(text: str) -> LeafKey:
    """The public key of a PEM signing request. Raises PeerFault if it is no request, its signature is wrong or
    the key too weak."""
    if len(text) > CSR_BYTES_MAX:
        raise PeerFault(f"csr: longer than {CSR_BYTES_MAX} bytes")
    try:
        request = x509.load_pem_x509_csr(text.encode("ascii"))
        key = request.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise PeerFault(f"csr: not a PEM certificate signing request: {str(error)[:200]}") from None
    if isinstance(key, rsa.RSAPublicKey):
        if not RSA_BITS_MIN <= key.key_size <= RSA_BITS_MAX:
            raise PeerFault(f"csr: RSA key of {key.key_size} bits: {RSA_BITS_MIN} to {RSA_BITS_MAX}")
    elif not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise PeerFault("csr: the key must be EC on P-256, or RSA")
    try:
        good = request.is_signature_valid
    except (ValueError, InvalidSignature, UnsupportedAlgorithm):
        good = False
    if not good:
        raise PeerFault("csr: the signature does not prove possession of the key")
    return key


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ambient.io.ca", description="The mesh's root certificate.")
    commands = parser.add_subparsers(dest="command", required=True)
    rotate = commands.add_parser("rotate", help="begin to replace the root; the running control plane does the rest")
    rotate.add_argument("--lifetime-s", type=float, help="longest life of a workload certificate (the control plane's)")
    rotate.add_argument("--distribute-s", type=float, help="how long both roots are trusted before the new one signs")
    rotate.add_argument("--overlap-s", type=float, help="how long both roots are trusted after that")
    status = commands.add_parser("status", help="say which roots there are and what comes next")
    for command in (rotate, status):
        command.add_argument("--data-dir", type=Path, required=True, help="data_dir of the control plane")
        command.add_argument("--trust-domain", default="cluster.local")
    options = parser.parse_args(arguments)
    directory = RootDirectory(options.data_dir, options.trust_domain)
    try:
        if not options.data_dir.is_dir():
            raise ConfigFault("--data-dir", str(options.data_dir), "is no directory")
        if options.command == "rotate":
            safe = Timing.of(directory.lifetime_s() if options.lifetime_s is None else options.lifetime_s)
            timing = Timing(
                safe.distribute_s if options.distribute_s is None else max(0.0, options.distribute_s),
                safe.overlap_s if options.overlap_s is None else max(0.0, options.overlap_s),
            )
            print(f"new root {directory.rotate(time.time(), timing)} is announced")
        old, new, rotation = directory.status()
        print(f"stage {rotation.stage.value}, root {old}" + (f", new root {new}" if new else ""))
        left = remaining_s(rotation)
        if left is not None:
            print(f"next step after {left:.0f} s of the control plane's work")
    except AmbientError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
