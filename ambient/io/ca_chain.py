"""A signing chain that the user brings by files, verified up to a root before anything is signed with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from ambient.errors import ConfigFault

RSA_BITS_MIN = 2048
RSA_BITS_MAX = 8192
FILE_BYTES_MAX = 1024 * 1024

SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)


@dataclass(frozen=True, slots=True)
class Issuer:
    """What signs and what is trusted. ``chain`` goes from the signing certificate up to, but without, a root;
    it is empty where the signing certificate is itself a root."""

    key: SigningKey
    certificate: x509.Certificate
    chain: tuple[x509.Certificate, ...]
    roots: tuple[x509.Certificate, ...]


def file_signature(path: Path) -> tuple[int, ...]:
    """Changes when the file does; empty if there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class UserFiles:
    """``root_cert_file`` (signing certificate, then its issuers), ``root_key_file``, ``root_bundle_file``."""

    certificate: Path
    key: Path
    bundle: Path

    def signature(self) -> tuple[int, ...]:
        return (*file_signature(self.certificate), *file_signature(self.key), *file_signature(self.bundle))

    def load(self, now: float) -> Issuer:
        """Read and verify the chain from the signing certificate to a root of the bundle. Raises ConfigFault
        naming the setting, the file and what is wrong."""
        chain = self._certificates("root_cert_file", self.certificate)
        bundle = self._certificates("root_bundle_file", self.bundle)
        # an old root that has run out is no reason not to start: nothing can chain to it any more
        roots = [root for root in bundle if root.not_valid_after_utc.timestamp() > now]
        if not roots:
            raise ConfigFault("root_bundle_file", str(self.bundle), "every root in it has expired")
        key = self._key()
        if key.public_key() != chain[0].public_key():
            raise ConfigFault(
                "root_key_file", str(self.key), f"is not the key of the first certificate of {self.certificate}"
            )
        for root in roots:
            _check_ca("root_bundle_file", self.bundle, root, now, below=None)
            try:
                root.verify_directly_issued_by(root)
            except (ValueError, TypeError, InvalidSignature):
                raise ConfigFault("root_bundle_file", str(self.bundle), f"{_name(root)} is not self-signed") from None
        for position, certificate in enumerate(chain):
            _check_ca("root_cert_file", self.certificate, certificate, now, below=position)
            if certificate in roots:
                return Issuer(key, chain[0], tuple(chain[:position]), tuple(roots))
            if position + 1 == len(chain):
                issuers = [root for root in roots if _allows(root, len(chain))]
            else:
                issuers = [chain[position + 1]]
            if not any(_issued(certificate, issuer) for issuer in issuers):
                wanted = "the certificate after it" if position + 1 < len(chain) else f"any root of {self.bundle}"
                raise ConfigFault(
                    "root_cert_file", str(self.certificate), f"{_name(certificate)} is not signed by {wanted}"
                )
        return Issuer(key, chain[0], tuple(chain), tuple(roots))

    def _certificates(self, field: str, path: Path) -> list[x509.Certificate]:
        try:
            found = x509.load_pem_x509_certificates(_read_setting(field, path))
        except ValueError as error:
            raise ConfigFault(field, str(path), f"is not PEM with certificates: {error}") from None
        if not 1 <= len(found) <= 64:
            raise ConfigFault(field, str(path), f"holds {len(found)} certificates, not 1 to 64")
        return found

    def _key(self) -> SigningKey:
        field = "root_key_file"
        try:
            key = serialization.load_pem_private_key(_read_setting(field, self.key), None)
        except (ValueError, TypeError) as error:
            raise ConfigFault(field, str(self.key), f"is not an unencrypted PEM private key: {error}") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
            raise ConfigFault(field, str(self.key), "is neither an RSA nor an EC key")
        return key


def _read_setting(field: str, path: Path) -> bytes:
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise ConfigFault(field, str(path), f"is larger than {FILE_BYTES_MAX} bytes")
        return path.read_bytes()
    except OSError as error:
        raise ConfigFault(field, str(path), f"cannot be read: {error.strerror}") from None


def _name(certificate: x509.Certificate) -> str:
    return certificate.subject.rfc4514_string() or "(no subject)"


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _allows(root: x509.Certificate, below: int) -> bool:
    length = root.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
    return length is None or length >= below


def _check_ca(field: str, path: Path, certificate: x509.Certificate, now: float, below: int | None) -> None:
    """Whether the certificate may sign, with ``below`` CA certificates under it (None: do not look)."""

    def wrong(problem: str) -> ConfigFault:
        return ConfigFault(field, str(path), f"{_name(certificate)}: {problem}")

    if not certificate.subject.rdns:
        raise wrong("a CA certificate needs a subject")
    if certificate.not_valid_before_utc.timestamp() > now:
        raise wrong(f"is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC")
    if certificate.not_valid_after_utc.timestamp() <= now:
        raise wrong(f"expired at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value if _has_usage(certificate) else None
    except (x509.ExtensionNotFound, ValueError):
        raise wrong("is no CA certificate (no basicConstraints)") from None
    if not constraints.ca:
        raise wrong("is no CA certificate (basicConstraints says CA:FALSE)")
    if below is not None and constraints.path_length is not None and constraints.path_length < below:
        raise wrong(f"allows {constraints.path_length} CA certificates below it, and there are {below}")
    if usage is not None and not usage.key_cert_sign:
        raise wrong("its keyUsage does not allow signing certificates")
    public = certificate.public_key()
    if isinstance(public, rsa.RSAPublicKey):
        if not RSA_BITS_MIN <= public.key_size <= RSA_BITS_MAX:
            raise wrong(f"RSA key of {public.key_size} bits: {RSA_BITS_MIN} to {RSA_BITS_MAX}")
    elif not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, _CURVES):
        raise wrong("neither RSA nor EC on P-256, P-384 or P-521")


def _has_usage(certificate: x509.Certificate) -> bool:
    return any(isinstance(extension.value, x509.KeyUsage) for extension in certificate.extensions)
