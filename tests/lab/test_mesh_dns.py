"""Names in the mesh: the DNS proxy answers for services and pods, passes the rest on, and nobody notices it."""

from __future__ import annotations

import json

import pytest

from ambient.lab.driver import eventually
from tests.lab.meshed import MeshedLab

pytestmark = [pytest.mark.lab]

RESOLVE = """
import json, socket, sys
def ask(name, family):
    try:
        return sorted({a[4][0] for a in socket.getaddrinfo(name, 80, family, socket.SOCK_STREAM)})
    except socket.gaierror as error:
        return error.errno
print(json.dumps([ask(name, f) for name in sys.argv[1:] for f in (socket.AF_INET, socket.AF_INET6)]))
"""
OVER_TCP = """
import json, socket, struct
name = b"".join(bytes([len(p)]) + p for p in b"catalog.shop.svc.cluster.local".split(b".")) + b"\\0"
query = struct.pack("!6H", 7, 256, 1, 0, 0, 0) + name + struct.pack("!2H", 1, 1)
s = socket.create_connection(("10.96.0.10", 53), 5)
s.sendall(struct.pack("!H", len(query)) + query)
(size,) = struct.unpack("!H", s.recv(2))
print(json.dumps([s.getpeername()[0], socket.inet_ntoa(s.recv(size)[-4:])]))
"""
FROM = """
import json, socket, struct
name = b"".join(bytes([len(p)]) + p for p in b"catalog.shop.svc.cluster.local".split(b".")) + b"\\0"
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5)
s.sendto(struct.pack("!6H", 7, 256, 1, 0, 0, 0) + name + struct.pack("!2H", 1, 1), ("10.96.0.10", 53))
answer, source = s.recvfrom(512)
print(json.dumps([source, socket.inet_ntoa(answer[-4:])]))
"""


def resolve(mesh: MeshedLab, *names: str, pod: str = "client", namespace: str = "shop") -> list[object]:
    found: list[object] = json.loads(mesh.driver.exec(namespace, pod, "python3", "-c", RESOLVE, *names))
    return found


def vip(mesh: MeshedLab, name: str) -> str:
    return str(mesh.driver.get("service", "-n", "shop", name)["spec"]["clusterIP"])


def test_names_resolve_as_they_do_without_the_mesh(mesh: MeshedLab) -> None:
    names = ("catalog", "catalog.shop", "catalog.shop.svc.cluster.local", "nobody", "kube-dns.kube-system")
    inside = resolve(mesh, *names)
    assert inside[0] == inside[2] == inside[4] == [vip(mesh, "catalog")]
    outside = resolve(mesh, "catalog.shop", "nobody", "kube-dns.kube-system", pod="stranger", namespace="outside")
    assert inside[2:4] == outside[0:2] and inside[6:] == outside[2:]


def test_the_answer_seems_to_come_from_the_server_that_was_asked(mesh: MeshedLab) -> None:
    source, address = json.loads(mesh.driver.exec("shop", "client", "python3", "-c", FROM))
    assert source == ["10.96.0.10", 53] and address == vip(mesh, "catalog")
    peer, address = json.loads(mesh.driver.exec("shop", "client", "python3", "-c", OVER_TCP))
    assert peer == "10.96.0.10" and address == vip(mesh, "catalog")


def test_a_headless_service_resolves_to_pods_and_is_reached_through_the_tunnel(mesh: MeshedLab) -> None:
    mesh.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: headless, namespace: shop}\n"
        "spec: {clusterIP: None, selector: {app: payments}, ports: [{port: 8080}]}\n"
    )
    address = mesh.address("shop", "payments")
    # an IPv4 service has no IPv6 addresses, also if its pods have
    eventually(lambda: resolve(mesh, "headless")[0] == [address], 10, "the name to resolve")
    assert isinstance(resolve(mesh, "headless")[1], int)
    with mesh.driver.capture() as wire:
        answer = mesh.get("http://headless:8080/whoami")
    assert answer["answer"]["client"] == mesh.address("shop", "client") and answer["peer"] == address
    assert wire.to_port(15008) > 0 and wire.to_port(8080) == 0


def test_names_are_answered_with_the_control_plane_stopped(mesh: MeshedLab) -> None:
    mesh.stop("control")
    try:
        assert resolve(mesh, "payments")[0] == [vip(mesh, "payments")]
    finally:
        mesh.start("control")
        eventually(mesh.control_pid, 10, "the control plane")
