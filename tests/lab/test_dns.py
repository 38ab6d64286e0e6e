"""The cluster's DNS: names of services and pods, and nothing else; garbage never raises."""

from __future__ import annotations

import ipaddress
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambient.lab import dns
from ambient.lab.objects import SERVICE
from ambient.manifest.kinds import ENDPOINT_SLICE


def names() -> dns.Names:
    services = [
        ("web", {"clusterIP": "10.96.0.5", "clusterIPs": ["10.96.0.5", "fd00:96::5"]}),
        ("db", {"clusterIP": "None"}),
        ("far", {"type": "ExternalName", "externalName": "example.org"}),
    ]
    slices = [
        {
            "metadata": {"name": "db-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "db"}},
            "addressType": "IPv4",
            "endpoints": [
                {"addresses": ["10.244.1.2"], "hostname": "db-0", "conditions": {"ready": True}},
                {"addresses": ["10.244.1.3"], "conditions": {"ready": False}},
            ],
        }
    ]
    return dns.Names(
        {
            f"shop/{name}": SERVICE.convert({"metadata": {"name": name, "namespace": "shop"}, "spec": spec})
            for name, spec in services
        },
        [ENDPOINT_SLICE.convert(item) for item in slices],
    )


def query(name: str, kind: int = dns.A, klass: int = 1, flags: int = 0x0100) -> bytes:
    return struct.pack("!6H", 7, flags, 1, 0, 0, 0) + dns.encode_name(name) + struct.pack("!2H", kind, klass)


def ask(name: str, kind: int = dns.A, limit: int = 512, **more: Any) -> tuple[int, list[str]]:
    """Response code and addresses of the answer, read by hand."""
    message = query(name, kind, **more)
    reply = dns.answer(message, names(), limit)
    assert reply is not None
    number, flags, questions, answers, _, _ = struct.unpack_from("!6H", reply)
    assert (number, questions) == (7, 1) and flags & 0x8000
    offset = len(message)
    assert reply[12:offset] == message[12:]
    found = []
    for _ in range(answers):
        pointer, _, _, _, length = struct.unpack_from("!HHHIH", reply, offset)
        assert pointer == 0xC00C
        data = reply[offset + 12 : offset + 12 + length]
        found.append(str(ipaddress.ip_address(data)) if length in (4, 16) else data.decode("latin-1"))
        offset += 12 + length
    assert offset == len(reply)
    return flags & 0xF, found


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("web.shop.svc.cluster.local", dns.A, ["10.96.0.5"]),
        ("WEB.Shop.svc.Cluster.Local", dns.A, ["10.96.0.5"]),
        ("web.shop.svc.cluster.local", dns.AAAA, ["fd00:96::5"]),
        ("web.shop.svc.cluster.local", dns.SRV, []),
        ("db.shop.svc.cluster.local", dns.A, ["10.244.1.2"]),
        ("db.shop.svc.cluster.local", dns.AAAA, []),
        ("db-0.db.shop.svc.cluster.local", dns.A, ["10.244.1.2"]),
        ("10-244-1-9.shop.pod.cluster.local", dns.A, ["10.244.1.9"]),
        ("fd00-244--9.shop.pod.cluster.local", dns.AAAA, ["fd00:244::9"]),
    ],
)
def test_names_of_the_cluster_are_answered(name: str, kind: int, expected: list[str]) -> None:
    assert ask(name, kind) == (dns.NO_ERROR, expected)


@pytest.mark.parametrize(
    "name",
    [
        "nope.shop.svc.cluster.local",
        "web.other.svc.cluster.local",
        "db-1.db.shop.svc.cluster.local",
        "x.web.shop.svc.cluster.local",
        "web.shop",
        "example.org",
        "cluster.local",
        "",
    ],
)
def test_every_other_name_does_not_exist(name: str) -> None:
    assert ask(name) == (dns.NAME_ERROR, [])


def test_an_external_name_is_an_alias() -> None:
    code, found = ask("far.shop.svc.cluster.local")
    assert code == dns.NO_ERROR and found == ["\x07example\x03org\0"]


def test_an_answer_that_does_not_fit_says_so_and_is_empty() -> None:
    reply = dns.answer(query("web.shop.svc.cluster.local"), names(), 50)
    assert reply is not None and struct.unpack_from("!6H", reply)[1] & 0x0200
    assert struct.unpack_from("!6H", reply)[3] == 0


def test_other_classes_and_operations_are_refused() -> None:
    assert ask("web.shop.svc.cluster.local", klass=3) == (dns.REFUSED, [])
    assert ask("web.shop.svc.cluster.local", flags=0x2800) == (dns.NOT_IMPLEMENTED, [])


@given(st.binary(max_size=600))
def test_any_bytes_get_an_answer_or_silence(message: bytes) -> None:
    reply = dns.answer(message, names(), 512)
    assert reply is None or (reply[:2] == message[:2] and reply[2] & 0x80 and len(reply) <= 512 + 300)


def test_an_answer_is_never_answered() -> None:
    assert dns.answer(query("web.shop.svc.cluster.local", flags=0x8180), names(), 512) is None
