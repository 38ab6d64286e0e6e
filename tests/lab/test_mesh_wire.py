"""What crosses the underlay: readable before enrolling, only TLS 1.3 on 15008 after; both ends see true addresses."""

from __future__ import annotations

import secrets

import pytest

from ambient import ports
from ambient.lab.driver import eventually
from ambient.lab.wire import TLS_1_3, Segment
from tests.lab.meshed import GET, MeshedLab

pytestmark = [pytest.mark.lab]


def buy(mesh: MeshedLab, marker: str) -> None:
    command = ("python3", str(GET), "--count", "3", "--marker", marker, "http://frontend/buy")
    answers = mesh.driver.exec("shop", "client", *command)
    assert answers.count('"status": 200') == 3


def between_pods(segment: Segment) -> bool:
    return all(str(address).startswith("10.244.") for address in (segment.source, segment.destination))


def test_a_marker_is_readable_before_enrolling_and_never_while_enrolled(mesh: MeshedLab) -> None:
    before = mesh.pids("shop")
    marker = secrets.token_hex(12)
    with mesh.driver.capture() as wire:
        buy(mesh, marker)
    assert not wire.contains(marker)
    assert wire.to_port(ports.HBONE) > 0
    pods = [segment for segment in wire.segments if between_pods(segment)]
    assert pods and all(ports.HBONE in segment.ports for segment in pods)
    mesh.unenrol("shop")
    try:
        marker = secrets.token_hex(12)
        with mesh.driver.capture() as wire:
            buy(mesh, marker)
        assert wire.contains(marker)
    finally:
        mesh.enrol("shop")
    assert mesh.pids("shop") == before


def test_tunnels_speak_tls_1_3(mesh: MeshedLab) -> None:
    assert TLS_1_3 == 0x0304
    address = mesh.address("shop", "payments")
    command = ["openssl", "s_client", "-connect", f"{address}:{ports.HBONE}", "-tls1_2"]
    argv = ["nsenter", f"--net=/run/netns/{mesh.node(1).netns}", *command]
    assert "NONE" in mesh.driver.run(argv, check=False)


@pytest.mark.parametrize("target", ["catalog", "cart"])  # on the other node, on the same node
def test_the_application_sees_its_clients_pod_address_and_the_client_the_address_it_dialled(
    mesh: MeshedLab, target: str
) -> None:
    answer = mesh.get(f"http://{target}/whoami")
    client = mesh.address("shop", "client")
    assert answer["answer"]["client"] == answer["local"] == client
    assert answer["answer"]["local"] == mesh.address("shop", target)
    assert answer["peer"] == mesh.driver.get("service", "-n", "shop", target)["spec"]["clusterIP"]


def test_a_pod_is_reached_by_its_own_address_too(mesh: MeshedLab) -> None:
    address = mesh.address("shop", "payments")
    with mesh.driver.capture() as wire:
        answer = mesh.get(f"http://{address}:8080/whoami")
    assert answer["answer"]["client"] == mesh.address("shop", "client") and answer["peer"] == address
    assert not any(8080 in segment.ports for segment in wire.segments)


def test_a_client_outside_the_mesh_still_gets_in_and_is_seen_at_its_own_address(mesh: MeshedLab) -> None:
    answer = mesh.get("http://catalog.shop/whoami", pod="stranger", namespace="outside")
    assert answer["status"] == 200 and answer["answer"]["client"] == mesh.address("outside", "stranger")


def test_a_pod_in_the_mesh_reaches_one_outside_in_plaintext(mesh: MeshedLab) -> None:
    address = mesh.address("outside", "stranger")
    with mesh.driver.background("outside", "stranger", "python3", "-m", "http.server", "8099"):
        answer = eventually(
            lambda: (found := mesh.get(f"http://{address}:8099/")).get("status") and found, 10, "an answer"
        )
    assert answer["status"] == 200
