"""Where the Kubernetes API server is and how to prove who we are: in-cluster or a kubeconfig.

Tokens in files are read again after a minute, because the kubelet rotates them. Key material given inline
in a kubeconfig reaches OpenSSL through memfd and never touches the disk. Credential plugins (``exec``,
``auth-provider``) are refused by name: running a user's command inside a daemon is not wanted.
"""

from __future__ import annotations

import base64
import binascii
import os
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ambient.errors import ConfigFault, PlatformFault

SERVICE_ACCOUNT_DIR = "/var/run/secrets/kubernetes.io/serviceaccount"
TOKEN_REREAD_S = 60.0


@dataclass(slots=True)
class Credentials:
    """Server address, TLS context (None for http) and the Authorization header, fresh at each request."""

    server: str
    tls: ssl.SSLContext | None = None
    server_hostname: str | None = None
    token: str = ""
    token_file: str = ""
    basic: str = ""
    clock: Callable[[], float] = time.monotonic
    _read_at: float = field(default=float("-inf"), repr=False)

    def authorization(self) -> str | None:
        """The Authorization header, or None. Keeps the last token if the file cannot be read."""
        if self.token_file and self.clock() - self._read_at >= TOKEN_REREAD_S:
            try:
                text = Path(self.token_file).read_text(encoding="ascii").strip()
            except (OSError, UnicodeDecodeError) as error:
                if not self.token:
                    raise PlatformFault(
                        f"service account token {self.token_file}: {error}: mount it or give a kubeconfig"
                    ) from None
            else:
                self.token, self._read_at = text, self.clock()
        if self.token:
            return f"Bearer {self.token}"
        return f"Basic {self.basic}" if self.basic else None

    def forget_token(self) -> None:
        """Read the token file again at the next request: the server refused the token."""
        self._read_at = float("-inf")


def in_cluster(environ: dict[str, str] | None = None, directory: str = SERVICE_ACCOUNT_DIR) -> Credentials:
    """The pod's service account. Raises PlatformFault outside a cluster."""
    env = os.environ if environ is None else environ
    host, port = env.get("KUBERNETES_SERVICE_HOST", ""), env.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise PlatformFault("no kubeconfig given and KUBERNETES_SERVICE_HOST is not set: not inside a cluster")
    try:
        tls = ssl.create_default_context(cafile=f"{directory}/ca.crt")
    except (OSError, ssl.SSLError) as error:
        raise PlatformFault(f"{directory}/ca.crt: {error}: is the service account mounted?") from None
    bracketed = f"[{host}]" if ":" in host else host
    return Credentials(f"https://{bracketed}:{port}", tls, token_file=f"{directory}/token")


def from_kubeconfig(path: str) -> Credentials:
    """The current context of a kubeconfig file. Raises ConfigFault naming the file and field."""
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigFault(f"kubeconfig {path}", "", str(error)[:300]) from None
    if not isinstance(config, dict):
        raise ConfigFault(f"kubeconfig {path}", config, "must be a mapping")
    context = _named(path, config, "contexts", "context", str(config.get("current-context") or ""))
    cluster = _named(path, config, "clusters", "cluster", str(context.get("cluster") or ""))
    user = _named(path, config, "users", "user", str(context["user"])) if context.get("user") else {}
    for unsupported in ("exec", "auth-provider"):
        if user.get(unsupported):
            raise ConfigFault(
                f"kubeconfig {path}: users[].user.{unsupported}", "...", "is not supported: use a token or certificate"
            )
    server = str(cluster.get("server") or "").rstrip("/")
    if not server.startswith(("https://", "http://")):
        raise ConfigFault(f"kubeconfig {path}: clusters[].cluster.server", server, "must be an http(s) URL")

    directory = Path(path).resolve().parent
    tls = _tls(path, directory, cluster, user) if server.startswith("https://") else None
    basic = ""
    if user.get("username"):
        basic = base64.b64encode(f"{user['username']}:{user.get('password', '')}".encode()).decode()
    token_file = str(directory / str(user["tokenFile"])) if user.get("tokenFile") else ""
    return Credentials(
        server,
        tls,
        server_hostname=cluster.get("tls-server-name") or None,
        token=str(user.get("token") or ""),
        token_file=token_file,
        basic=basic,
    )


def _named(path: str, config: dict[str, Any], plural: str, singular: str, name: str) -> dict[str, Any]:
    entries = config.get(plural)
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and entry.get("name") == name and isinstance(entry.get(singular), dict):
            found: dict[str, Any] = entry[singular]
            return found
    raise ConfigFault(f"kubeconfig {path}: {plural}", name, f"no such {singular} in the file")


def _material(path: str, directory: Path, entry: dict[str, Any], field_name: str) -> bytes | None:
    """PEM bytes of ``field`` (a file name) or ``field-data`` (base64), None if neither is given."""
    if data := entry.get(f"{field_name}-data"):
        try:
            return base64.b64decode(str(data), validate=True)
        except (binascii.Error, ValueError) as error:
            raise ConfigFault(f"kubeconfig {path}: {field_name}-data", "...", f"must be base64: {error}") from None
    if name := entry.get(field_name):
        try:
            return (directory / str(name)).read_bytes()
        except OSError as error:
            raise ConfigFault(f"kubeconfig {path}: {field_name}", name, str(error)) from None
    return None


def _tls(path: str, directory: Path, cluster: dict[str, Any], user: dict[str, Any]) -> ssl.SSLContext:
    authority = _material(path, directory, cluster, "certificate-authority")
    try:
        tls = ssl.create_default_context(cadata=authority.decode("ascii") if authority else None)
        if cluster.get("insecure-skip-tls-verify"):
            tls.check_hostname = False
            tls.verify_mode = ssl.CERT_NONE
        certificate = _material(path, directory, user, "client-certificate")
        key = _material(path, directory, user, "client-key")
        if certificate and key:
            with _memory_file(certificate) as certificate_path, _memory_file(key) as key_path:
                tls.load_cert_chain(certificate_path, key_path)
    except (ssl.SSLError, UnicodeDecodeError, ValueError, OSError) as error:
        raise ConfigFault(f"kubeconfig {path}: certificates", "...", str(error)) from None
    return tls


@contextmanager
def _memory_file(content: bytes) -> Iterator[str]:
    descriptor = os.memfd_create("kubeconfig", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
