"""While enrolled, nothing of an application's bytes can be read between the nodes; the ends see each other truly.

node1: a ----underlay (captured)---- node2: b
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from ambient import ports
from ambient.lab.wire import TLS_1_3, tls_summary
from tests.support.mesh import PORT, Mesh, pod, service

pytestmark = [pytest.mark.lab, pytest.mark.net]


@pytest.fixture(scope="module")
def pair(mesh: Mesh) -> Iterator[str]:
    with mesh.namespace(pod("a", "node1"), pod("b", "node2"), service("b")) as name:
        yield name


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("by", ["service", "pod"])
def test_no_plaintext_crosses_the_underlay_and_both_ends_see_the_truth(
    mesh: Mesh, pair: str, family: int, by: str
) -> None:
    marker = f"marker-{secrets.token_hex(8)}"
    target, port = (mesh.vip(pair, "b", family), 80) if by == "service" else (mesh.address(pair, "b", family), PORT)
    a, b = mesh.address(pair, "a", family), mesh.address(pair, "b", family)
    with mesh.capture() as capture:
        found = mesh.call(pair, "a", target, port, "--text", marker)
    assert found.get("echoed") == marker, found
    assert not capture.contains(marker)
    summary = tls_summary(capture.segments, ports.HBONE)
    assert capture.to_port(ports.HBONE) > 0
    assert (summary.versions <= {TLS_1_3}, summary.foreign) == (True, 0)
    assert not [
        s
        for s in capture.segments
        if s.payload and {str(s.source), str(s.destination)} == {a, b} and ports.HBONE not in s.ports
    ]
    # what the application sees: its own pod address and what it dialled; the server sees the client's pod address
    assert (found["local"][0], found["peer"]) == (a, [target, port])
    for end in ("peer", "accepted"):
        assert found["seen"][end][0].removeprefix("::ffff:") == a
        assert found["seen"][end][1] == found["local"][1]
    assert found["seen"]["local"][0].removeprefix("::ffff:") == b


def test_a_mapped_address_on_an_ipv6_socket_is_ipv4_all_the_way(mesh: Mesh, pair: str) -> None:
    found = mesh.call(pair, "a", mesh.vip(pair, "b"), 80, "--mapped")
    assert found.get("echoed") == "hello", found
    assert found["local"][0] == f"::ffff:{mesh.address(pair, 'a')}"
    assert found["peer"] == [f"::ffff:{mesh.vip(pair, 'b')}", 80]
    assert found["seen"]["peer"][0].removeprefix("::ffff:") == mesh.address(pair, "a")


def test_a_socket_bound_before_connect_is_captured_as_well(mesh: Mesh, pair: str) -> None:
    marker = f"marker-{secrets.token_hex(8)}"
    with mesh.capture() as capture:
        found = mesh.call(pair, "a", mesh.vip(pair, "b"), 80, "--bind", mesh.address(pair, "a"), "--text", marker)
    assert found.get("echoed") == marker, found
    assert not capture.contains(marker)


def test_the_capture_would_have_seen_it(mesh: Mesh) -> None:
    """The same without the mesh: the marker is readable, so its absence above means something."""
    marker = f"marker-{secrets.token_hex(8)}"
    with mesh.namespace(pod("a", "node1"), pod("b", "node2"), service("b"), enrolled=False) as name:
        with mesh.capture() as capture:
            found = mesh.call(name, "a", mesh.vip(name, "b"), 80, "--text", marker)
        assert found.get("echoed") == marker, found
        assert capture.contains(marker)
        assert capture.to_port(ports.HBONE) == 0
