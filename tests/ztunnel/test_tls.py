"""Who is let into a tunnel and who is not, at a real worker; and the identity in a certificate."""

from __future__ import annotations

import contextlib
import datetime
import socket
import ssl
import threading
import time
from collections.abc import Iterator

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.require import require
from tests.ztunnel.authority import Authority
from tests.ztunnel.harness import Mesh, mesh, spiffe, wait_until
from tests.ztunnel.hbone_client import HboneClient, client_context, load
from ztunnel.core import frames
from ztunnel.core import messages as m
from ztunnel.core.certificate import CertificateFault, peer_identity, uri_names
from ztunnel.core.frames import Code
from ztunnel.core.headers import encode
from ztunnel.io.server_tunnel import HANDSHAKES_OF_PEER

DAY = datetime.timedelta(days=1)


@pytest.fixture(scope="module")
def path() -> Iterator[Mesh]:
    require("net")
    with mesh() as it:
        it.b.listen(it.ip, it.port)
        yield it


def status_with(path: Mesh, context: ssl.SSLContext) -> int:
    """The answer to a CONNECT, 0 if the handshake or the tunnel was refused."""
    sock = path.a.connect(path.ip, 15008)
    try:
        client = HboneClient(sock, context)
        return client.status(client.connect(f"{path.ip}:{path.port}"))
    except (ssl.SSLError, ConnectionError):
        return 0
    finally:
        sock.close()


@pytest.mark.net
def test_a_client_of_the_trust_domain_is_let_in(path: Mesh):
    certificate = path.authority.certificate(spiffe("a"))
    assert status_with(path, client_context(certificate, path.authority.root_pem)) == 200


@pytest.mark.net
@pytest.mark.parametrize(
    "kind",
    ["none", "forged", "expired", "early", "foreign", "two names", "no name", "no spiffe", "no alpn", "http/1.1"],
)
def test_a_client_is_refused_with(path: Mesh, kind: str):
    authority, roots = path.authority, path.authority.root_pem
    before = path.server.control.counters.get("handshakes_failed", 0)
    match kind:
        case "none":
            context = client_context(None, roots)
        case "forged":
            context = client_context(Authority("root").certificate(spiffe("a")), roots)
        case "expired":
            context = client_context(authority.certificate(spiffe("a"), start=-2 * DAY, life=DAY), roots)
        case "early":
            context = client_context(authority.certificate(spiffe("a"), start=DAY), roots)
        case "foreign":
            context = client_context(authority.certificate(spiffe("a", "other.example")), roots)
        case "two names":
            context = client_context(authority.certificate(spiffe("a"), uris=(spiffe("a"), spiffe("b"))), roots)
        case "no name":
            context = client_context(authority.certificate(spiffe("a"), uris=()), roots)
        case "no spiffe":
            context = client_context(authority.certificate(spiffe("a"), uris=("https://a.example/",)), roots)
        case "no alpn":
            context = client_context(authority.certificate(spiffe("a")), roots, ())
        case _:
            context = client_context(authority.certificate(spiffe("a")), roots, ("http/1.1",))
    assert status_with(path, context) == 0
    wait_until(lambda: path.server.control.counters.get("handshakes_failed", 0) > before, "the refusal is counted")


@pytest.mark.net
def test_tls_1_2_is_refused(path: Mesh):
    context = client_context(path.authority.certificate(spiffe("a")), path.authority.root_pem)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert status_with(path, context) == 0


def answer_as(sock: socket.socket, context: ssl.SSLContext) -> None:
    """A server that does a handshake and nothing else."""
    while True:
        try:
            connection, _ = sock.accept()
        except OSError:
            return
        try:
            connection.settimeout(5)
            context.wrap_socket(connection, server_side=True).recv(100)
        except (OSError, ssl.SSLError):
            pass
        connection.close()


@pytest.mark.net
@pytest.mark.parametrize("kind", ["another identity", "forged", "expired", "no name"])
def test_a_server_is_refused_with(kind: str):
    require("net")
    with mesh() as path:
        match kind:
            case "another identity":
                certificate = path.authority.certificate(spiffe("c"))
            case "forged":
                certificate = Authority("root").certificate(spiffe("b"))
            case "expired":
                certificate = path.authority.certificate(spiffe("b"), start=-2 * DAY, life=DAY)
            case _:
                certificate = path.authority.certificate(spiffe("b"), uris=())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["h2"])
        load(context, certificate)
        impostor = path.b.listen(path.ip, 16008)
        threading.Thread(target=answer_as, args=(impostor, context), daemon=True).start()
        hop = path.route().hops[0]
        path.set_route(hops=(type(hop)(**{**{f: getattr(hop, f) for f in hop.__struct_fields__}, "port": 16008}),))
        with pytest.raises(ConnectionResetError):
            path.connect().recv(10)
        event = wait_until(lambda: path.client.control.events and path.client.control.events[-1], "an event")
        assert (event.event, event.flags, event.sent) == ("failed", "TLS_FAILURE", 0)
        impostor.shutdown(socket.SHUT_RDWR)


@pytest.mark.net
def test_a_renewed_certificate_and_a_new_root_serve_new_tunnels_and_leave_open_ones():
    require("net")
    with mesh() as path:
        listener = path.b.listen(path.ip, path.port)
        near = path.connect()
        near.sendall(b"1")
        far, _ = listener.accept()
        assert far.recv(1) == b"1"
        new = Authority("next")
        both = path.authority.root_pem + new.root_pem
        renewed = path.authority.certificate(spiffe("b"), generation=2, roots=both)
        path.server.control.send(renewed)
        serial = x509.load_pem_x509_certificate(renewed.chain_pem).serial_number

        def offered() -> bool:
            client = HboneClient(
                path.a.connect(path.ip, 15008), client_context(new.certificate(spiffe("z")), path.authority.root_pem)
            )
            der = client.tls.getpeercert(True)
            assert der is not None
            ok = x509.load_der_x509_certificate(der).serial_number == serial
            status = client.status(client.connect(f"{path.ip}:{path.port}")) if ok else 0
            client.close()
            return status == 200

        wait_until(offered, "the new certificate, trusting the new root, is used")
        near.sendall(b"2")
        assert far.recv(1) == b"2"


SHORT = datetime.timedelta(minutes=5, seconds=3)
"""Of a certificate that began five minutes ago."""


@pytest.mark.net
def test_a_client_whose_certificate_expires_gets_no_new_streams_and_keeps_those_it_has():
    require("net")
    with mesh() as path:
        listener = path.b.listen(path.ip, path.port)
        certificate = path.authority.certificate(spiffe("a"), life=SHORT)
        client = HboneClient(path.a.connect(path.ip, 15008), client_context(certificate, path.authority.root_pem))
        assert client.status(client.connect(f"{path.ip}:{path.port}")) == 200
        far, _ = listener.accept()
        while client.goaway is None:
            assert client.read()
        seen = b""  # h2 says nothing more after a GOAWAY
        while frames.goaway(1, 0) not in seen:
            seen += client.tls.recv(1 << 16)
        assert time.time() >= certificate.not_after
        block = encode([(b":method", b"CONNECT"), (b":authority", f"{path.ip}:{path.port}".encode())])
        client.tls.sendall(frames.frame(frames.HEADERS, frames.END_HEADERS, 3, block))
        client.tls.sendall(frames.frame(frames.DATA, frames.END_STREAM, 1, b"on"))
        assert far.recv(2) == b"on" and far.recv(1) == b""
        far.sendall(b"and back")
        far.close()
        while data := client.tls.recv(1 << 16):
            seen += data
        assert frames.rst_stream(3, Code.REFUSED_STREAM) in seen and b"and back" in seen


@pytest.mark.net
def test_a_server_whose_certificate_expires_gets_no_new_streams():
    require("net")
    with mesh() as path:
        listener = path.b.listen(path.ip, path.port)
        short = path.authority.certificate(spiffe("b"), life=SHORT, generation=2)
        path.server.control.send(short)

        def offered() -> bool:
            context = client_context(path.authority.certificate(spiffe("z")), path.authority.root_pem)
            client = HboneClient(path.a.connect(path.ip, 15008), context)
            der = client.tls.getpeercert(True)
            client.close()
            return der == x509.load_pem_x509_certificate(short.chain_pem).public_bytes(serialization.Encoding.DER)

        wait_until(offered, "the short certificate is used")
        near = path.connect()
        near.sendall(b"1")
        far, _ = listener.accept()
        assert far.recv(1) == b"1"
        path.server.control.send(path.authority.certificate(spiffe("b"), generation=3))

        def tunnels() -> int:
            with path.connect() as another:
                another.sendall(b"2")
                listener.accept()[0].close()
                path.client.control.connections = None
                path.client.control.send(m.AskConnections(number=1))
                return len(wait_until(lambda: path.client.control.connections, "what is open").tunnels)

        wait_until(lambda: tunnels() == 2, "another tunnel")
        assert time.time() >= short.not_after
        near.sendall(b"3")
        assert far.recv(1) == b"3"


@given(
    names=st.lists(
        st.sampled_from([spiffe("a"), "https://x.example/y", "spiffe://td/ns/a/sa/b", "urn:x", "spiffe://a/b"]),
        max_size=4,
    ),
    critical=st.booleans(),
    dns=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_names_are_read_as_cryptography_reads_them(names: list[str], critical: bool, dns: bool):
    general: list[x509.GeneralName] = [x509.UniformResourceIdentifier(name) for name in names]
    if dns:
        general.insert(len(general) // 2, x509.DNSName("a.example"))
    der = certificate_with(general, critical)
    assert uri_names(der) == tuple(names)
    if len(names) == 1 and names[0].count("/") == 6 and names[0].startswith("spiffe"):
        assert str(peer_identity(der)) == names[0]
    else:
        with pytest.raises(CertificateFault):
            peer_identity(der)


KEY = ec.generate_private_key(ec.SECP256R1())


def certificate_with(names: list[x509.GeneralName], critical: bool) -> bytes:
    now = datetime.datetime(2030, 1, 1)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([]))
        .public_key(KEY.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + DAY)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=critical)
    return builder.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


GOOD = certificate_with([x509.UniformResourceIdentifier(spiffe("a"))], True)


@given(at=st.integers(0, len(GOOD) - 1), byte=st.integers(0, 255), cut=st.integers(0, len(GOOD)))
@settings(max_examples=400, deadline=None)
def test_a_damaged_certificate_is_refused_or_read_but_never_breaks_the_parser(at: int, byte: int, cut: int):
    for damaged in (GOOD[:at] + bytes([byte]) + GOOD[at + 1 :], GOOD[:cut], GOOD + GOOD[:cut]):
        try:
            peer_identity(damaged)
        except CertificateFault:
            pass


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_garbage_is_no_certificate(data: bytes):
    with pytest.raises(CertificateFault):
        peer_identity(data)


@pytest.mark.net
def test_peers_that_never_finish_their_handshake_take_no_place_from_others(path: Mesh):
    context = client_context(path.authority.certificate(spiffe("a")), path.authority.root_pem)
    path.a.run("ip", "addr", "add", "10.77.0.77/24", "dev", "eth0", check=True)
    with contextlib.ExitStack() as idle:
        for _ in range(HANDSHAKES_OF_PEER + 8):
            sock = idle.enter_context(path.a.socket())
            sock.bind(("10.77.0.77", 0))
            sock.connect((path.ip, 15008))
        wait_until(lambda: path.server.control.counters.get("tunnels_refused", 0) >= 8, "those beyond the share")
        assert status_with(path, context) == 200
