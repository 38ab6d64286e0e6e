"""Software of others as pods of a mesh, unmodified, with its own defaults in how it reads, waits and buffers.

All listen on `PORT`. Their files lie in one directory that their own users may read.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ambient.io.bpf_maps import Maps
from ambient.lab.driver import Background, eventually
from tests.support.flows import Witness
from tests.support.kernel_path import Counted
from tests.support.mesh import APPS, PORT, Mesh, pod

GO_DIRECTORY = Path(__file__).resolve().parents[2] / "build" / "go"
POSTGRES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), Path("/nonexistent"))
CONNECT = """
import socket, sys
for host in sys.argv[1:]:
    try:
        socket.create_connection((host, 80), 5).close()
    except ConnectionRefusedError:
        pass  # by the destination itself: nobody listens yet
"""


@dataclass(frozen=True)
class Site:
    """Pods of node1 in one namespace, each behind a service of its name on port 80; ``acceleration`` is theirs all."""

    mesh: Mesh
    maps: Maps
    namespace: str
    directory: Path
    acceleration: str

    def vip(self, app: str) -> str:
        return self.mesh.vip(self.namespace, app)

    def run(self, *command: str, pod: str = "client", limit_s: float = 40.0) -> str:
        """What a program in a pod prints. CommandFailed unless it exits with 0."""
        return self.mesh.exec(self.namespace, pod, *command, timeout_s=limit_s)

    def background(self, pod: str, *command: str) -> AbstractContextManager[Background]:
        return self.mesh.background(self.namespace, pod, *command)

    def watch(self, app: str) -> Witness:
        addresses = [self.mesh.address(self.namespace, app, family) for family in (4, 6)]
        return Witness(self.maps, addresses, self.acceleration)

    def await_kernel_path(self, client: str, *apps: str) -> None:
        """The World has to know all pods before a verdict can be written, and endpoints follow readiness."""
        vips = [self.vip(app) for app in apps]

        def taken() -> bool:
            counted = Counted(self.maps)
            self.run("python3", "-c", CONNECT, *vips, pod=client)
            return counted["kernel"] >= 2 * len(vips) and not counted["captured"] and not counted["steered"]

        eventually(taken, 20, f"{client} to reach {apps} on the kernel's path")


@contextmanager
def shared_directory() -> Iterator[Path]:
    """Others than root may read it."""
    directory = Path(tempfile.mkdtemp(prefix="ambient-software-"))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@functools.cache
def go(name: str) -> str:
    """The path of one of tests/proof/apps/*.go, compiled with the standard library alone; a rerun finds it cached."""
    GO_DIRECTORY.mkdir(parents=True, exist_ok=True)
    own = {"GO111MODULE": "off", "CGO_ENABLED": "0", "GOFLAGS": "", "GOCACHE": str(GO_DIRECTORY / "cache")}
    command = ["go", "build", "-o", str(GO_DIRECTORY / name), str(APPS / f"{name}.go")]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return str(GO_DIRECTORY / name)


def stream(count: int) -> bytes:
    """What server.go sends for /bytes/COUNT."""
    blocks = (hashlib.sha256(number.to_bytes(8, "big")).digest() for number in range(-(-count // 32)))
    return b"".join(blocks)[:count]


def listening(name: str, command: Sequence[str], grace_s: int = 0, **metadata: Any) -> dict[str, Any]:
    """A pod that is ready when its port takes connections."""
    probe = {"tcpSocket": {"port": PORT}, "periodSeconds": 1, "failureThreshold": 1}
    found = pod(name, command=command, probe=probe, **metadata)
    found["spec"]["terminationGracePeriodSeconds"] = grace_s
    return found


def as_user(name: str) -> list[str]:
    return ["setpriv", f"--reuid={name}", f"--regid={name}", "--init-groups", "--"]


NGINX = """
daemon off; worker_processes 2; user www-data; pid {own}/pid; error_log {own}/error;
events {{ worker_connections 1024; }}
http {{ access_log off; sendfile on; client_max_body_size 64m;
 client_body_temp_path {own}/b; proxy_temp_path {own}/p; fastcgi_temp_path {own}/f; uwsgi_temp_path {own}/u;
 scgi_temp_path {own}/s;
 server {{ listen {port}; listen [::]:{port}; root {own}/files; location /put/ {{ dav_methods PUT; }} }} }}
"""


def nginx(directory: Path, **metadata: Any) -> dict[str, Any]:
    """Serves DIRECTORY/nginx/files, and takes PUT below /put/."""
    own = directory / "nginx"
    (own / "files" / "put").mkdir(parents=True)
    shutil.chown(own / "files" / "put", "www-data")
    (own / "conf").write_text(NGINX.format(own=own, port=PORT))
    return listening("nginx", ["nginx", "-e", str(own / "error"), "-c", str(own / "conf")], **metadata)


def go_server(**metadata: Any) -> dict[str, Any]:
    return listening("go", [go("server")], **metadata)


def redis(directory: Path, name: str = "redis", **metadata: Any) -> dict[str, Any]:
    """As its own user, nothing saved. DEBUG is allowed, for its digest of all data."""
    own = directory / name
    own.mkdir()
    shutil.chown(own, "redis")
    words = ["redis-server", "--port", str(PORT), "--bind", "*", "-::*", "--protected-mode", "no", "--save", ""]
    words += ["--dir", str(own), "--enable-debug-command", "yes", "--repl-diskless-sync-delay", "0"]
    return listening(name, [*as_user("redis"), *words], **metadata)


def cluster(directory: Path) -> Path:
    """An empty database cluster of PostgreSQL. Everybody may log in."""
    where = directory / "cluster"
    where.mkdir()
    shutil.chown(where, "postgres")
    words = ["-D", str(where), "--no-sync", "--no-instructions", "--auth=trust", "--encoding=UTF8", "--locale=C"]
    command = [*as_user("postgres"), str(POSTGRES / "initdb"), "--wal-segsize=1", *words]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with (where / "pg_hba.conf").open("a") as rules:
        rules.write("host all all all trust\n")
    return where


def postgres(directory: Path, template: Path, **metadata: Any) -> dict[str, Any]:
    """On a copy of a cluster."""
    own = directory / "postgres"
    subprocess.run(["cp", "-a", str(template), str(own)], check=True)
    options = {"listen_addresses": "*", "unix_socket_directories": "", "fsync": "off", "shared_buffers": "16MB"}
    options |= {"dynamic_shared_memory_type": "mmap", "max_connections": "20"}
    words = [str(POSTGRES / "postgres"), "-D", str(own), "-p", str(PORT)]
    for option, value in options.items():
        words += ["-c", f"{option}={value}"]
    # Told to stop it gives its shared memory back, which a killed one leaves behind.
    return listening("postgres", [*as_user("postgres"), *words], grace_s=5, **metadata)


def go_proxy(target: str, **metadata: Any) -> dict[str, Any]:
    """io.Copy in both directions between its client and HOST:PORT. Without a probe, which would be passed on."""
    return pod("goproxy", command=[go("proxy"), target], **metadata)


HAPROXY = """
global
    stats socket {own}/stats mode 600
defaults
    mode tcp
    timeout connect 5s
    timeout client {idle_s}s
    timeout server {idle_s}s
    {option}
listen all
    bind :::{port} v4v6
    server only {target}
"""


def haproxy(directory: Path, name: str, target: str, option: str = "", idle_s: int = 60, **metadata: Any) -> Any:
    """A TCP proxy to HOST:PORT; ``option`` is one more line of its defaults."""
    own = directory / name
    own.mkdir()
    (own / "conf").write_text(HAPROXY.format(own=own, port=PORT, target=target, option=option, idle_s=idle_s))
    return pod(name, command=["haproxy", "-db", "-f", str(own / "conf")], **metadata)


def spliced(directory: Path, name: str) -> int:
    """Bytes that an HAProxy has moved by splice() since it started, as its `show info` says."""
    with socket.socket(socket.AF_UNIX) as asked:
        asked.settimeout(5)
        asked.connect(str(directory / name / "stats"))
        asked.sendall(b"show info\n")
        text = b"".join(iter(lambda: asked.recv(65536), b"")).decode()
    # 2.6 misspells the name
    return next(int(line.partition(": ")[2]) for line in text.splitlines() if line.startswith("TotalSpli"))
