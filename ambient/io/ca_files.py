"""The roots the CA made itself, on disk.

``data_dir`` (0700) holds one ``root-<id>.pem`` (0600: key and certificate) per root, ``ca.json`` that says
which of them signs and how far a rotation is (the one file that decides; replaced atomically), and
``root-bundle.pem``, the roots to trust now, for whoever distributes them; ``leaf-lifetime`` says in seconds how long
leaves live. Writers hold a lock.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ambient.control.rotation import Rotation, Stage, Timing, advance, roles, start
from ambient.errors import ConfigFault, OurFault, PlatformFault
from ambient.io.ca_chain import Issuer, SigningKey, file_signature

ROOT_LIFE_S = 3650 * 86400
SEEN_EVERY_S = 60.0
BUNDLE = "root-bundle.pem"
LIFETIME = "leaf-lifetime"
LIFETIME_S = 86400.0

_ROOT_FILE = re.compile(r"root-([0-9a-f]{16})\.pem")


def pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")


# ---- our own roots ----


class _State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """ca.json. ``old`` and ``new`` are ids of root files; ``new`` is empty while steady."""

    old: str
    new: str = ""
    stage: str = "steady"
    distribute_s: float = 0.0
    overlap_s: float = 0.0
    served_s: float = 0.0
    seen: float = 0.0

    def rotation(self) -> Rotation:
        return Rotation(Stage(self.stage), Timing(self.distribute_s, self.overlap_s), self.served_s, self.seen)

    @staticmethod
    def of(old: str, new: str, rotation: Rotation) -> _State:
        timing = rotation.timing
        return _State(
            old, new, rotation.stage.value, timing.distribute_s, timing.overlap_s, rotation.served_s, rotation.seen
        )


class RootDirectory:
    """The CA's own roots in ``data_dir``."""

    def __init__(self, directory: Path, trust_domain: str) -> None:
        self._directory = directory
        self._trust_domain = trust_domain

    def load(self, now: float) -> Issuer:
        """The issuer of the present stage; the first call ever makes the root. Raises PlatformFault if the
        directory cannot be used, OurFault if what is in it cannot be ours."""
        with self._locked():
            state = self._read() or self._adopt_or_make(now)
            return self._publish(state)

    def signature(self) -> tuple[int, ...]:
        """Changes when the state on disk does."""
        return file_signature(self._directory / "ca.json")

    def tick(self, now: float) -> bool:
        """Move a rotation on if it is due; whether the stage changed. For the running CA only."""
        with self._locked():
            state = self._read()
            if state is None or state.stage == Stage.STEADY.value:
                return False
            before = state.rotation()
            after = advance(before, now)
            if after.stage is before.stage:
                if after.seen - before.seen >= SEEN_EVERY_S or after.seen < before.seen:
                    self._write("ca.json", msgspec.json.encode(_State.of(state.old, state.new, after)), 0o600)
                return False
            if after.stage is Stage.STEADY:
                self._write("ca.json", msgspec.json.encode(_State(old=state.new)), 0o600)
                (self._directory / f"root-{state.old}.pem").unlink(missing_ok=True)
            else:
                self._write("ca.json", msgspec.json.encode(_State.of(state.old, state.new, after)), 0o600)
            return True

    def rotate(self, now: float, timing: Timing) -> str:
        """Begin a rotation; the id of the new root. Raises ConfigFault if there is nothing to rotate yet or a
        rotation is under way."""
        with self._locked():
            state = self._read()
            if state is None:
                raise ConfigFault("--data-dir", str(self._directory), "holds no root: start the control plane first")
            begun = start(state.rotation(), timing)
            if begun is None:
                raise ConfigFault("--data-dir", str(self._directory), f"a rotation is under way ({state.stage})")
            new = self._make(now)
            self._write("ca.json", msgspec.json.encode(_State.of(state.old, new, begun)), 0o600)
            return new

    def keep_lifetime(self, seconds: int) -> None:
        """The longest life of a leaf, for whoever begins a rotation without the settings at hand."""
        with self._locked():
            text = b"%d\n" % seconds
            if _read_if_any(self._directory / LIFETIME) != text:
                self._write(LIFETIME, text, 0o644)

    def lifetime_s(self) -> float:
        """What `keep_lifetime` kept; a day if nothing readable."""
        text = (_read_if_any(self._directory / LIFETIME) or b"").strip()
        return float(text) if text.isdigit() and len(text) < 12 else LIFETIME_S

    def status(self) -> tuple[str, str, Rotation]:
        """Ids of the old and the new root (empty if none), and the rotation."""
        state = self._read()
        if state is None:
            raise ConfigFault("--data-dir", str(self._directory), "holds no root: start the control plane first")
        return state.old, state.new, state.rotation()

    def _publish(self, state: _State) -> Issuer:
        roots = {"old": self._root(state.old)}
        if state.new:
            roots["new"] = self._root(state.new)
        try:
            part = roles(Stage(state.stage))
            key, certificate = roots[part.signs]
            trusted = tuple(roots[name][1] for name in part.trusted)
        except (KeyError, ValueError):
            raise OurFault(f"{self._directory}/ca.json: stage {state.stage!r} without a new root") from None
        bundle = "".join(pem(root) for root in trusted).encode()
        if _read_if_any(self._directory / BUNDLE) != bundle:
            self._write(BUNDLE, bundle, 0o644)
        return Issuer(key, certificate, (), trusted)

    def _adopt_or_make(self, now: float) -> _State:
        """No ca.json: a first start, or one that was cut off before it could write it."""
        found = [m.group(1) for p in self._directory.iterdir() if (m := _ROOT_FILE.fullmatch(p.name))]
        if len(found) > 1:
            raise OurFault(
                f"{self._directory}: {len(found)} roots but no ca.json that says which one signs; restore ca.json from"
                f" a backup, or keep one root file and remove the others: {', '.join(sorted(found))}"
            )
        state = _State(old=found[0] if found else self._make(now))
        self._write("ca.json", msgspec.json.encode(state), 0o600)
        return state

    def _make(self, now: float) -> str:
        identifier = secrets.token_hex(8)
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, self._trust_domain[:64]),
                x509.NameAttribute(NameOID.COMMON_NAME, f"ambient root {identifier}"),
            ]
        )
        begin = datetime.datetime.fromtimestamp(int(now) - 120, datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + datetime.timedelta(seconds=ROOT_LIFE_S))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(key_usage(ca=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        text = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        self._write(f"root-{identifier}.pem", text + pem(certificate).encode(), 0o600)
        return identifier

    def _root(self, identifier: str) -> tuple[SigningKey, x509.Certificate]:
        path = self._directory / f"root-{identifier}.pem"
        try:
            mode = path.stat().st_mode
            text = path.read_bytes()
        except OSError as error:
            raise OurFault(f"{path}: the root's key cannot be read: {error.strerror}") from None
        if stat.S_IMODE(mode) & 0o077:
            raise OurFault(f"{path}: mode {stat.S_IMODE(mode):04o}: the root's key must be 0600; who has read it?")
        try:
            key = serialization.load_pem_private_key(text, None)
            certificate = x509.load_pem_x509_certificate(text)
        except (ValueError, TypeError) as error:
            raise OurFault(f"{path}: not a root made by this CA: {error}") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
            raise OurFault(f"{path}: key and certificate do not belong together")
        return key, certificate

    def _read(self) -> _State | None:
        path = self._directory / "ca.json"
        text = _read_if_any(path)
        if text is None:
            return None
        try:
            state = msgspec.json.decode(text, type=_State)
            Stage(state.stage)
        except (msgspec.DecodeError, ValueError) as error:
            raise OurFault(f"{path}: not written by this CA: {error}") from None
        return state

    def _write(self, name: str, data: bytes, mode: int) -> None:
        """Whole or not at all, also after a power cut."""
        try:
            descriptor, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=self._directory)
            try:
                os.fchmod(descriptor, mode)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self._directory / name)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
            directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise PlatformFault(f"{self._directory / name}: cannot be written: {error.strerror}") from None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._directory.chmod(0o700)
            descriptor = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise PlatformFault(f"{self._directory}: the CA's directory cannot be used: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def serial_number() -> int:
    """128 random bits, positive."""
    return secrets.randbits(128) or 1


def key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _read_if_any(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PlatformFault(f"{path}: cannot be read: {error.strerror}") from None
