"""The pods of a benchmark, as Kubernetes objects: a client that sleeps, a server with nginx and load.c's server.

With Envoy each of the two has one beside it, as a sidecar that applications talk to by loopback: client -> its Envoy ->
mTLS -> the server's Envoy -> server. That spares Envoy the capture of connections.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from pathlib import Path as Directory
from typing import Any, Final

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ambient.bench.plan import Path

LOAD_PORT: Final = 7000
HTTP_PORT: Final = 8080
ENVOY_OUT: Final = 9000
"""Added to the port that is meant: where the client's Envoy listens on loopback."""
ENVOY_IN: Final = 20000
"""Added likewise: where the server's Envoy listens for mTLS."""
NGINX: Final = """
worker_processes 2; daemon off; pid {dir}/pid; error_log {dir}/error crit;
events {{ worker_connections 8192; }}
http {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 600s; tcp_nodelay on;
 client_body_temp_path {dir}/b; proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u;
 scgi_temp_path {dir}/s;
 server {{ listen 8080 backlog=8192; location / {{ return 200 "0123456789"; }} }} }}
"""
_V3 = "type.googleapis.com/envoy.extensions"
Json = dict[str, Any]


def objects(path: Path, directory: Directory, load: Directory, envoy: str) -> list[Json]:
    """The namespace of one path and its two pods. Files they need are written below ``directory``."""
    labels = {"istio.io/dataplane-mode": "ambient"} if path.mesh else {}
    annotations = {"ambient.mesh/acceleration": path.acceleration} if path.acceleration else {}
    own = directory / path.name
    (own / "nginx").mkdir(parents=True, exist_ok=True)
    (own / "nginx.conf").write_text(NGINX.format(dir=own / "nginx"))
    server = [
        ("nginx", ["nginx", "-e", str(own / "nginx" / "error"), "-c", str(own / "nginx.conf")]),
        ("load", [str(load), "serve", str(LOAD_PORT)]),
    ]
    client = [("idle", ["sleep", "infinity"])]
    if path.envoy:
        certificates(own)
        for who, containers in (("server", server), ("client", client)):
            config = own / f"{who}.json"
            config.write_text("{}")
            containers.append(("envoy", [envoy, "-c", str(config), "--concurrency", "1", "--use-dynamic-base-id"]))
            containers[-1][1].extend(("-l", "error", "--drain-time-s", "1"))
        (own / "server.json").write_text(json.dumps(_server_config(own)))
        # the client's needs the server's address, which nobody knows yet: a name of the cluster's DNS
        (own / "client.json").write_text(json.dumps(_client_config(own, f"server.{path.namespace}.svc.cluster.local")))
    head = {"name": path.namespace, "labels": labels, "annotations": annotations}
    found: list[Json] = [{"apiVersion": "v1", "kind": "Namespace", "metadata": head}]
    for name, containers, node in (
        ("server", server, "node2" if path.across else "node1"),
        ("client", client, "node1"),
    ):
        found.append({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": _named(name, path)})
        found.append(_pod(name, path, containers, node))
    headless = {"clusterIP": "None", "selector": {"app": "server"}, "ports": [{"name": "tcp", "port": LOAD_PORT}]}
    found.append({"apiVersion": "v1", "kind": "Service", "metadata": _named("server", path), "spec": headless})
    return found


def _named(name: str, path: Path) -> Json:
    return {"name": name, "namespace": path.namespace}


def _pod(name: str, path: Path, containers: Iterable[tuple[str, list[str]]], node: str) -> Json:
    made: list[Json] = []
    for title, command in containers:
        container: Json = {"name": title, "image": "none", "command": command}
        if title in ("load", "nginx"):
            port = LOAD_PORT if title == "load" else HTTP_PORT
            container["readinessProbe"] = {"tcpSocket": {"port": port}, "periodSeconds": 1, "failureThreshold": 1}
        made.append(container)
    spec = {
        "nodeName": node,
        "serviceAccountName": name,
        "terminationGracePeriodSeconds": 0,
        "containers": made,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {**_named(name, path), "labels": {"app": name}},
        "spec": spec,
    }


def write(file: Directory, documents: Iterable[Json]) -> None:
    file.write_text(yaml.safe_dump_all(documents, sort_keys=False))


# --- Envoy


def _address(ip: str, port: int) -> Json:
    return {"socket_address": {"address": ip, "port_value": port}}


def _cluster(name: str, host: str, port: int, **more: Any) -> Json:
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": _address(host, port)}}]}]
    kind = "STATIC" if host.replace(".", "").isdigit() else "STRICT_DNS"
    return {
        "name": name,
        "type": kind,
        "dns_lookup_family": "V4_ONLY",
        "load_assignment": {"cluster_name": name, "endpoints": endpoints},
        **more,
    }


def _tls(own: Directory, kind: str) -> Json:
    common = {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [
            {
                "certificate_chain": {"filename": f"{own}/{kind.lower()}.crt"},
                "private_key": {"filename": f"{own}/{kind.lower()}.key"},
            }
        ],
        "validation_context": {
            "trusted_ca": {"filename": f"{own}/root.crt"},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"prefix": "spiffe://cluster.local/"}}],
        },
    }
    more = {"require_client_certificate": True} if kind == "Downstream" else {}
    context = {"@type": f"{_V3}.transport_sockets.tls.v3.{kind}TlsContext", "common_tls_context": common, **more}
    return {"name": "tls", "typed_config": context}


def _listener(ip: str, port: int, cluster: str, **more: Any) -> Json:
    proxy = {"@type": f"{_V3}.filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": cluster, "cluster": cluster}
    chain = {"filters": [{"name": "tcp", "typed_config": proxy}], **more}
    return {"name": cluster, "address": _address(ip, port), "filter_chains": [chain], "tcp_backlog_size": 8192}


def _client_config(own: Directory, server: str) -> Json:
    ports = (LOAD_PORT, HTTP_PORT)
    return {
        "static_resources": {
            "listeners": [_listener("127.0.0.1", ENVOY_OUT + port, f"to{port}") for port in ports],
            "clusters": [
                _cluster(f"to{port}", server, ENVOY_IN + port, transport_socket=_tls(own, "Upstream"), **_limits())
                for port in ports
            ],
        }
    }


def _server_config(own: Directory) -> Json:
    ports = (LOAD_PORT, HTTP_PORT)
    return {
        "static_resources": {
            "listeners": [
                _listener("0.0.0.0", ENVOY_IN + port, f"to{port}", transport_socket=_tls(own, "Downstream"))
                for port in ports
            ],
            "clusters": [_cluster(f"to{port}", "127.0.0.1", port, **_limits()) for port in ports],
        }
    }


def _limits() -> Json:
    """Envoy's own limit of 1,024 connections would refuse what is measured."""
    many = {"max_connections": 100_000, "max_pending_requests": 100_000, "max_requests": 100_000}
    return {"circuit_breakers": {"thresholds": [many]}}


def certificates(own: Directory) -> None:
    """A root and a leaf for each of the two, P-256 as the mesh's: ROLE.crt and ROLE.key."""
    now = datetime.datetime.now(datetime.UTC)
    root_key = ec.generate_private_key(ec.SECP256R1())
    root_name = x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "ambient bench")])

    def build(subject: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(root_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
        )

    constraints = x509.BasicConstraints(ca=True, path_length=None)
    root = build(root_name, root_key.public_key()).add_extension(constraints, critical=True)
    (own / "root.crt").write_bytes(root.sign(root_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    for kind, account in (("upstream", "client"), ("downstream", "server")):
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.UniformResourceIdentifier(f"spiffe://cluster.local/ns/bench/sa/{account}")
        leaf = build(x509.Name([]), key.public_key())
        leaf = leaf.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        leaf = leaf.add_extension(x509.SubjectAlternativeName([name]), critical=True)
        (own / f"{kind}.crt").write_bytes(leaf.sign(root_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        file = own / f"{kind}.key"
        file.touch(mode=0o600)
        file.write_bytes(private)
