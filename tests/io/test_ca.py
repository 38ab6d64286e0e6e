"""The CA: its root on disk, chains that users bring, leaves as they must be, and rotation with overlap."""

from __future__ import annotations

import datetime
import ipaddress
import logging
import stat
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ambient.errors import ConfigFault, OurFault, PeerFault
from ambient.io import ca
from ambient.io.ca import Authority, read_csr
from ambient.io.ca_client import check_chain, key_pem, make_csr, make_key, trust_bundle
from ambient.io.ca_files import RootDirectory
from ambient.model.identity import Identity
from ambient.settings import ControlSettings, NodeSettings

WEB = Identity("cluster.local", "shop", "web")
Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def open_authority(tmp_path: Path, now: float | None = None, **more: object) -> Authority:
    settings = ControlSettings(data_dir=str(tmp_path / "data"), **more)  # type: ignore[arg-type]
    return Authority.open(settings, time.time() if now is None else now)


def verifies(tmp_path: Path, chain: tuple[str, ...], bundle: str, *, at: float | None = None) -> bool:
    """What openssl says of the chain, for both uses of a workload's certificate."""
    (tmp_path / "leaf.pem").write_text(chain[0])
    (tmp_path / "between.pem").write_text("".join(chain[1:-1]))
    (tmp_path / "bundle.pem").write_text(bundle)
    between = ["-untrusted", str(tmp_path / "between.pem")] if len(chain) > 2 else []
    when = ["-attime", str(int(at))] if at is not None else []
    return all(
        subprocess.run(
            [
                "openssl",
                "verify",
                "-x509_strict",
                "-purpose",
                purpose,
                "-CAfile",
                tmp_path / "bundle.pem",
                *between,
                *when,
            ]
            + [tmp_path / "leaf.pem"],
            capture_output=True,
            check=False,
        ).returncode
        == 0
        for purpose in ("sslserver", "sslclient")
    )


# ---- leaves ----


def test_a_leaf_has_one_critical_uri_name_and_nothing_of_the_request(tmp_path: Path) -> None:
    authority = open_authority(tmp_path)
    now = time.time()
    issued = authority.issue(read_csr(make_csr(make_key(), "spiffe://cluster.local/ns/evil/sa/evil")), WEB, 3600, now)
    leaf = x509.load_pem_x509_certificate(issued.chain[0].encode())
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.critical
    assert list(names.value) == [x509.UniformResourceIdentifier("spiffe://cluster.local/ns/shop/sa/web")]
    assert leaf.subject.rdns == []
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature
    assert not usage.key_cert_sign
    assert not usage.key_encipherment
    assert set(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == {
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
    }
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert leaf.not_valid_after_utc.timestamp() == int(now) + 3600
    assert int(now) - 120 <= leaf.not_valid_before_utc.timestamp() < now
    assert 0 < leaf.serial_number < 2**128
    assert verifies(tmp_path, issued.chain, authority.bundle_pem)
    assert not verifies(tmp_path, issued.chain, authority.bundle_pem, at=now + 3700)


def test_serial_numbers_do_not_repeat_and_are_long(tmp_path: Path) -> None:
    authority, key = open_authority(tmp_path), make_key().public_key()
    serials = [authority.issue(key, WEB, 60, time.time()).serial for _ in range(64)]
    assert len(set(serials)) == 64
    assert max(serials).bit_length() > 112


def test_the_server_certificate_names_hosts_and_addresses(tmp_path: Path) -> None:
    certificate = open_authority(tmp_path).issue_server(("control.example", "127.0.0.1"), time.time())
    leaf = x509.load_pem_x509_certificate(certificate.chain_pem)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["control.example"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("127.0.0.1")]


# ---- requests ----


def test_ec_p256_and_rsa_2048_requests_are_taken() -> None:
    assert isinstance(read_csr(make_csr(make_key(), str(WEB))), ec.EllipticCurvePublicKey)
    assert isinstance(read_csr(csr_of(rsa.generate_private_key(65537, 2048))), rsa.RSAPublicKey)


def csr_of(key: object) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    request = builder.sign(key, algorithm)  # type: ignore[arg-type]
    return request.public_bytes(serialization.Encoding.PEM).decode()


def forged_csr() -> str:
    """A request whose key is somebody else's: the signature is over it, but by another key."""
    text = csr_of(make_key())
    raw = bytearray(x509.load_pem_x509_csr(text.encode()).public_bytes(serialization.Encoding.DER))
    other = x509.load_pem_x509_csr(csr_of(make_key()).encode())
    mine = x509.load_pem_x509_csr(text.encode())
    point, other_point = (
        r.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)  # type: ignore[union-attr]
        for r in (mine, other)
    )
    at = raw.index(point)
    raw[at : at + len(point)] = other_point
    return x509.load_der_x509_csr(bytes(raw)).public_bytes(serialization.Encoding.PEM).decode()


@pytest.mark.parametrize(
    ("csr", "problem"),
    [
        (lambda: "", "not a PEM"),
        (lambda: "garbage", "not a PEM"),
        (lambda: "ümlaut", "not a PEM"),
        (lambda: "x" * 20000, "longer than"),
        (lambda: csr_of(make_key()).replace("A", "B", 1), "not a PEM|possession"),
        (forged_csr, "possession"),
        (lambda: csr_of(rsa.generate_private_key(65537, 1024)), "1024 bits"),
        (lambda: csr_of(ec.generate_private_key(ec.SECP384R1())), "P-256"),
        (lambda: csr_of(ed25519.Ed25519PrivateKey.generate()), "P-256"),
    ],
)
def test_a_bad_request_is_refused(csr: object, problem: str) -> None:
    with pytest.raises(PeerFault, match=problem):
        read_csr(csr())  # type: ignore[operator]


# ---- our own root ----


def root_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "data").glob("root-*.pem"))


def keys_of(tmp_path: Path) -> list[Path]:
    return [path for path in root_files(tmp_path) if path.name != "root-bundle.pem"]


def test_the_root_is_made_once_and_kept_for_its_owner_alone(tmp_path: Path) -> None:
    first = open_authority(tmp_path)
    (key,) = keys_of(tmp_path)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    before = key.read_bytes()
    second = open_authority(tmp_path)
    assert second.bundle_pem == first.bundle_pem
    assert keys_of(tmp_path) == [key]
    assert key.read_bytes() == before
    assert (tmp_path / "data" / "root-bundle.pem").read_text() == first.bundle_pem
    root = x509.load_pem_x509_certificate(first.bundle_pem.encode())
    assert 3640 < (root.not_valid_after_utc - datetime.datetime.now(datetime.UTC)).days <= 3650
    assert isinstance(root.public_key(), ec.EllipticCurvePublicKey)


def test_a_root_that_others_could_read_is_refused(tmp_path: Path) -> None:
    open_authority(tmp_path)
    keys_of(tmp_path)[0].chmod(0o640)
    with pytest.raises(OurFault, match="0640"):
        open_authority(tmp_path)


def test_a_first_start_that_was_cut_off_is_finished(tmp_path: Path) -> None:
    bundle = open_authority(tmp_path).bundle_pem
    (tmp_path / "data" / "ca.json").unlink()
    assert open_authority(tmp_path).bundle_pem == bundle


def test_a_damaged_state_is_refused_and_never_replaced(tmp_path: Path) -> None:
    open_authority(tmp_path)
    state = tmp_path / "data" / "ca.json"
    good = state.read_bytes()
    for damage in (
        b"",
        b"{}",
        b'{"old":"x"}',
        good.replace(b"steady", b"strange"),
        good.replace(b"steady", b"switched"),
    ):
        state.write_bytes(damage)
        with pytest.raises(OurFault):
            open_authority(tmp_path)
        assert len(keys_of(tmp_path)) == 1
    state.unlink()
    (tmp_path / "data" / "root-00000000000000ff.pem").write_text("another")
    with pytest.raises(OurFault, match=r"ca\.json"):
        open_authority(tmp_path)


# ---- rotation ----


def test_a_rotation_overlaps_so_that_every_leaf_verifies_with_every_bundle_of_its_time(tmp_path: Path) -> None:
    now = float(int(time.time()))
    authority = open_authority(tmp_path, now, secret_ttl_max_s=1000)
    key = make_key().public_key()
    changed: list[float] = []
    authority.listen(lambda: changed.append(now))
    data = str(tmp_path / "data")
    assert ca.main(["rotate", "--data-dir", data, "--lifetime-s", "1000"]) == 0
    assert ca.main(["rotate", "--data-dir", data]) == 1, "one at a time"
    old_bundle = authority.bundle_pem
    history: list[tuple[float, tuple[str, ...], str]] = []
    bundles: list[str] = [old_bundle]
    for _ in range(60):
        now += 50
        authority.poll(now)
        if authority.bundle_pem != bundles[-1]:
            bundles.append(authority.bundle_pem)
        history.append((now, authority.issue(key, WEB, 1000, now).chain, authority.bundle_pem))
    assert [text.count("BEGIN") for text in bundles] == [1, 2, 1]
    assert bundles[0] in bundles[1]
    assert bundles[2] in bundles[1]
    assert bundles[0] != bundles[2]
    assert len(changed) == 3, "announced, switched, done"
    assert len(keys_of(tmp_path)) == 1, "the old key is gone"
    assert open_authority(tmp_path, now).bundle_pem == bundles[2]
    # a holder renews at half life: it has a bundle that is at most 500 s old, and a leaf that is at most 1000 s old
    for at, _, bundle in history[::3]:
        for signed, chain, _ in history[::3]:
            if signed - 500 <= at <= signed + 500:
                assert verifies(tmp_path, chain, bundle, at=max(at, signed)), (at, signed)


def test_a_rotation_lasts_as_long_as_the_control_planes_certificates_need(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    week = 7 * 86400
    open_authority(tmp_path, secret_ttl_max_s=week)
    data = tmp_path / "data"
    assert ca.main(["rotate", "--data-dir", str(data)]) == 0
    assert f"next step after {0.6 * week:.0f} s" in capsys.readouterr().out
    (data / "leaf-lifetime").write_text("nonsense")
    assert RootDirectory(data, "cluster.local").lifetime_s() == 86400


def test_a_rotation_started_while_the_ca_is_away_still_announces_in_full(tmp_path: Path) -> None:
    now = float(int(time.time()))
    authority = open_authority(tmp_path, now)
    before = authority.bundle_pem
    ca.main(["rotate", "--data-dir", str(tmp_path / "data"), "--distribute-s", "100", "--overlap-s", "100"])
    later = open_authority(tmp_path, now + 10_000)
    later.poll(now + 10_000)
    chain = later.issue(make_key().public_key(), WEB, 60, now + 10_000).chain
    assert later.bundle_pem.count("BEGIN") == 2
    assert verifies(tmp_path, chain, before, at=now + 10_000), "still signed by the old root"


def test_rotation_is_refused_where_there_is_nothing_to_rotate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ca.main(["rotate", "--data-dir", str(tmp_path)]) == 1
    assert "holds no root" in capsys.readouterr().err
    assert ca.main(["status", "--data-dir", str(tmp_path / "none")]) == 1
    assert "no directory" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    open_authority(tmp_path)
    assert ca.main(["status", "--data-dir", str(tmp_path / "data")]) == 0
    assert "stage steady" in capsys.readouterr().out


# ---- a chain the user brings ----


@dataclass
class Made:
    key: Key
    certificate: x509.Certificate

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


def make(
    name: str,
    issuer: Made | None = None,
    *,
    key: Key | None = None,
    is_ca: bool = True,
    path_length: int | None = None,
    days: int = 30,
    begins_in: int = -1,
    may_sign: bool = True,
) -> Made:
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    begin = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=begins_in)
    signer = issuer.key if issuer else key
    usage = ca.key_usage(ca=may_sign)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(is_ca, path_length if is_ca else None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if issuer:
        authority_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())  # type: ignore[arg-type]
        builder = builder.add_extension(authority_key, critical=False)
    return Made(key, builder.sign(signer, hashes.SHA256()))


def bring(tmp_path: Path, chain: str, key: bytes, bundle: str) -> dict[str, str]:
    for name, text in (("chain.pem", chain.encode()), ("key.pem", key), ("roots.pem", bundle.encode())):
        (tmp_path / name).write_bytes(text)
    return {
        "root_cert_file": str(tmp_path / "chain.pem"),
        "root_key_file": str(tmp_path / "key.pem"),
        "root_bundle_file": str(tmp_path / "roots.pem"),
    }


@pytest.mark.parametrize(
    "signing_key",
    [
        lambda: rsa.generate_private_key(65537, 2048),
        lambda: ec.generate_private_key(ec.SECP256R1()),
        lambda: ec.generate_private_key(ec.SECP384R1()),
    ],
    ids=["rsa", "p256", "p384"],
)
@pytest.mark.parametrize("root_key", [None, rsa.generate_private_key(65537, 2048)], ids=["ec-root", "rsa-root"])
def test_an_intermediate_by_files_signs_and_its_chain_verifies(
    tmp_path: Path, signing_key: object, root_key: Key | None
) -> None:
    root = make("root", key=root_key)
    middle = make("middle", root)
    signing = make("signing", middle, key=signing_key())  # type: ignore[operator]
    files = bring(tmp_path, signing.pem + middle.pem, signing.key_pem, root.pem)
    authority = open_authority(tmp_path, **files)
    issued = authority.issue(make_key().public_key(), WEB, 600, time.time())
    assert issued.chain[1:] == (signing.pem, middle.pem, root.pem)
    assert verifies(tmp_path, issued.chain, root.pem)
    assert not (tmp_path / "data").exists(), "no root of our own is made"


def test_a_leaf_never_outlives_any_certificate_of_its_chain(tmp_path: Path) -> None:
    root = make("root", days=400)
    middle = make("middle", root, days=2, begins_in=-1)
    signing = make("signing", middle, days=20)
    files = bring(tmp_path, signing.pem + middle.pem, signing.key_pem, root.pem)
    issued = open_authority(tmp_path, secret_ttl_max_s=10**7, **files).issue(
        make_key().public_key(), WEB, 10**7, time.time()
    )
    assert issued.life.not_after <= middle.certificate.not_valid_after_utc.timestamp()


ROOT = make("root")
OTHER = make("other root")
SIGNING = make("signing", ROOT)


@pytest.mark.parametrize(
    ("chain", "key", "bundle", "field", "problem"),
    [
        (SIGNING.pem, OTHER.key_pem, ROOT.pem, "root_key_file", "not the key"),
        (SIGNING.pem, b"garbage", ROOT.pem, "root_key_file", "private key"),
        ("garbage", SIGNING.key_pem, ROOT.pem, "root_cert_file", "PEM"),
        (SIGNING.pem, SIGNING.key_pem, "", "root_bundle_file", "PEM"),
        (SIGNING.pem, SIGNING.key_pem, OTHER.pem, "root_cert_file", "not signed by any root"),
        (SIGNING.pem + OTHER.pem, SIGNING.key_pem, ROOT.pem, "root_cert_file", "not signed by the certificate after"),
        (SIGNING.pem, SIGNING.key_pem, SIGNING.pem + ROOT.pem, "root_bundle_file", "not self-signed"),
        *(
            (made.pem, made.key_pem, ROOT.pem, "root_cert_file", problem)
            for made, problem in (
                (make("leaf", ROOT, is_ca=False), "CA:FALSE"),
                (make("old", ROOT, days=1, begins_in=-3), "expired"),
                (make("early", ROOT, begins_in=3), "not valid before"),
                (make("mute", ROOT, may_sign=False), "keyUsage"),
                (make("weak", ROOT, key=rsa.generate_private_key(65537, 1024)), "1024 bits"),
            )
        ),
    ],
)
def test_a_wrong_chain_is_refused_at_start_by_setting_and_reason(
    tmp_path: Path, chain: str, key: bytes, bundle: str, field: str, problem: str
) -> None:
    with pytest.raises(ConfigFault, match=f"{field}: .*{problem}"):
        open_authority(tmp_path, **bring(tmp_path, chain, key, bundle))


def test_a_path_length_that_the_chain_exceeds_is_refused(tmp_path: Path) -> None:
    root = make("root", path_length=0)
    files = bring(tmp_path, (signing := make("signing", root)).pem, signing.key_pem, root.pem)
    with pytest.raises(ConfigFault, match="not signed by any root"):
        open_authority(tmp_path, **files)
    good = make("root", path_length=1)
    middle = make("middle", good, path_length=0)
    below = make("below", middle)
    with pytest.raises(ConfigFault, match="allows 0 CA certificates"):
        open_authority(tmp_path, **bring(tmp_path, below.pem + middle.pem, below.key_pem, good.pem))
    open_authority(tmp_path, **bring(tmp_path, middle.pem, middle.key_pem, good.pem))


def test_the_three_files_go_together(tmp_path: Path) -> None:
    files = bring(tmp_path, SIGNING.pem, SIGNING.key_pem, ROOT.pem)
    with pytest.raises(ConfigFault, match="root_key_file"):
        open_authority(tmp_path, **{**files, "root_key_file": ""})
    with pytest.raises(ConfigFault, match=r"root_bundle_file: .*cannot be read"):
        open_authority(tmp_path, **{**files, "root_bundle_file": str(tmp_path / "none")})


def test_an_expired_root_beside_a_good_one_is_dropped(tmp_path: Path) -> None:
    old = make("old root", days=1, begins_in=-3)
    authority = open_authority(tmp_path, **bring(tmp_path, SIGNING.pem, SIGNING.key_pem, old.pem + ROOT.pem))
    assert authority.bundle_pem == ROOT.pem


def test_changed_files_are_taken_over_and_wrong_ones_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = bring(tmp_path, SIGNING.pem, SIGNING.key_pem, ROOT.pem)
    authority = open_authority(tmp_path, **files)
    assert not authority.poll(time.time())
    bring(tmp_path, SIGNING.pem, OTHER.key_pem, ROOT.pem)
    with caplog.at_level(logging.ERROR):
        assert not authority.poll(time.time())
        assert not authority.poll(time.time())
    assert [record.levelname for record in caplog.records] == ["ERROR"], "reported once"
    assert authority.bundle_pem == ROOT.pem
    signing = make("next", OTHER)
    bring(tmp_path, signing.pem, signing.key_pem, ROOT.pem + OTHER.pem)
    assert authority.poll(time.time())
    assert authority.bundle_pem == ROOT.pem + OTHER.pem
    assert authority.issue(make_key().public_key(), WEB, 60, time.time()).chain[1] == signing.pem


# ---- the client's checks ----


def test_the_client_takes_only_its_own_identity_and_key(tmp_path: Path) -> None:
    authority, key = open_authority(tmp_path), make_key()
    csr = make_csr(key, str(WEB))
    chain = authority.issue(read_csr(csr), WEB, 60, time.time()).chain
    check_chain(chain, str(WEB), csr)
    assert key_pem(key).startswith(b"-----BEGIN PRIVATE KEY")
    with pytest.raises(PeerFault, match="is for"):
        check_chain(chain, "spiffe://cluster.local/ns/shop/sa/db", csr)
    with pytest.raises(PeerFault, match="another key"):
        check_chain(chain, str(WEB), make_csr(make_key(), str(WEB)))
    for wrong in ((), chain[:1], ("x", "y"), (chain[0], "y")):
        with pytest.raises(PeerFault):
            check_chain(wrong, str(WEB), csr)


def test_the_trust_bundle_is_the_chains_roots_and_the_files_without_repeats(tmp_path: Path) -> None:
    settings = NodeSettings(node_name="n", ca_root_file=str(tmp_path / "roots.pem"))
    assert trust_bundle(settings, ("leaf", ROOT.pem)) == ROOT.pem.encode()
    (tmp_path / "roots.pem").write_text(ROOT.pem + OTHER.pem)
    both = trust_bundle(settings, ("leaf", OTHER.pem))
    assert both.count(b"BEGIN") == 2
    assert both == trust_bundle(settings, ("leaf", ROOT.pem))
    (tmp_path / "roots.pem").write_text("garbage")
    assert trust_bundle(settings, ("leaf", OTHER.pem)) == OTHER.pem.encode()
