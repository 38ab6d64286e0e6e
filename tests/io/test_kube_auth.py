"""Credentials of the Kubernetes API: kubeconfigs and the in-cluster service account."""

from __future__ import annotations

import base64
import datetime
import ssl
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ambient.errors import ConfigFault, PlatformFault
from ambient.io.kube_auth import Credentials, from_kubeconfig, in_cluster


def pair() -> tuple[bytes, bytes]:
    """A self-signed certificate and its key, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    form = serialization.PrivateFormat.PKCS8
    return pem, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


CERTIFICATE, KEY = pair()
DATA = {"certificate": base64.b64encode(CERTIFICATE).decode(), "key": base64.b64encode(KEY).decode()}


def write(directory: Path, cluster: dict[str, Any], user: dict[str, Any], **more: Any) -> str:
    config = {
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:6443/"} | cluster}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path = directory / "kubeconfig"
    path.write_text(yaml.safe_dump(config | more))
    return str(path)


def test_inline_certificates_become_a_tls_context(tmp_path: Path) -> None:
    user = {"client-certificate-data": DATA["certificate"], "client-key-data": DATA["key"]}
    path = write(tmp_path, {"certificate-authority-data": DATA["certificate"], "tls-server-name": "kubernetes"}, user)
    made = from_kubeconfig(path)
    assert made.server == "https://127.0.0.1:6443" and made.server_hostname == "kubernetes"
    assert made.tls is not None and made.tls.verify_mode is ssl.CERT_REQUIRED
    assert made.tls.cert_store_stats()["x509_ca"] == 1  # and no authority of the system
    assert made.authorization() is None


def test_files_are_found_beside_the_kubeconfig(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(CERTIFICATE)
    (tmp_path / "token").write_text("sesame\n")
    made = from_kubeconfig(write(tmp_path, {"certificate-authority": "ca.pem"}, {"tokenFile": "token"}))
    assert made.authorization() == "Bearer sesame"


def test_tokens_and_passwords_are_sent(tmp_path: Path) -> None:
    insecure = {"insecure-skip-tls-verify": True}
    made = from_kubeconfig(write(tmp_path, insecure, {"token": "t"}))
    assert made.authorization() == "Bearer t"
    assert made.tls is not None and made.tls.verify_mode is ssl.CERT_NONE
    made = from_kubeconfig(write(tmp_path, insecure, {"username": "a", "password": "b"}))
    assert made.authorization() == "Basic " + base64.b64encode(b"a:b").decode()
    assert from_kubeconfig(write(tmp_path, {"server": "http://127.0.0.1:8080"}, {})).tls is None


@pytest.mark.parametrize(
    ("cluster", "user", "more", "said"),
    [
        ({}, {}, {"current-context": "y"}, "contexts: 'y': no such context"),
        ({}, {}, {"users": []}, "users: 'u': no such user"),
        ({}, {}, {"clusters": [5]}, "clusters: 'c': no such cluster"),
        ({"server": "ftp://x"}, {}, {}, r"clusters\[\].cluster.server"),
        ({}, {"exec": {"command": "aws"}}, {}, r"users\[\].user.exec"),
        ({}, {"auth-provider": {"name": "gcp"}}, {}, "auth-provider"),
        ({"certificate-authority-data": "%%%"}, {}, {}, "certificate-authority-data"),
        ({"certificate-authority-data": base64.b64encode(b"no").decode()}, {}, {}, "certificates"),
        ({"certificate-authority": "absent.pem"}, {}, {}, "certificate-authority"),
    ],
)
def test_what_is_wrong_with_a_kubeconfig_is_named(
    tmp_path: Path, cluster: dict[str, Any], user: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigFault, match=said):
        from_kubeconfig(write(tmp_path, cluster, user, **more))


@pytest.mark.parametrize("text", ["", "a: [", "- 5", "[" * 5000])
def test_a_file_that_is_no_kubeconfig_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(text)
    with pytest.raises(ConfigFault, match="kubeconfig"):
        from_kubeconfig(str(path))
    with pytest.raises(ConfigFault, match="absent"):
        from_kubeconfig(str(tmp_path / "absent"))


def test_a_token_file_is_read_again_each_minute_and_the_last_token_outlives_the_file(tmp_path: Path) -> None:
    now = 0.0
    token = tmp_path / "token"
    token.write_text("one")
    made = Credentials("https://x", token_file=str(token), clock=lambda: now)
    assert made.authorization() == "Bearer one"
    token.write_text("two")
    now = 59.0
    assert made.authorization() == "Bearer one"
    now = 60.0
    assert made.authorization() == "Bearer two"
    token.unlink()
    now = 200.0
    assert made.authorization() == "Bearer two"
    made.forget_token()
    assert made.authorization() == "Bearer two"


def test_a_pod_without_a_token_says_so(tmp_path: Path) -> None:
    with pytest.raises(PlatformFault, match="mount it or give a kubeconfig"):
        Credentials("https://x", token_file=str(tmp_path / "token")).authorization()


def test_in_a_cluster_the_service_account_is_used(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_bytes(CERTIFICATE)
    (tmp_path / "token").write_text("mounted")
    made = in_cluster({"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}, str(tmp_path))
    assert made.server == "https://[fd00::1]:6443" and made.authorization() == "Bearer mounted"


def test_outside_a_cluster_without_kubeconfig_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(PlatformFault, match="not inside a cluster"):
        in_cluster({}, str(tmp_path))
    with pytest.raises(PlatformFault, match="is the service account mounted"):
        in_cluster({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, str(tmp_path))
