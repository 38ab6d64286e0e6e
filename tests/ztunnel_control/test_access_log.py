"""The access log: Istio's fields in Istio's order, as text and as JSON."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from tests.support.shop import spiffe
from tests.ztunnel_control.test_metrics import LOCAL, WORLD, event
from ztunnel.core.attributes import describe
from ztunnel.io import access_log
from ztunnel.io.logs import Line, timestamp


def ends(found: Any) -> Any:
    return describe(WORLD, LOCAL, found)


OUT = event(
    "closed",
    hbone_address="10.0.0.2:15008",
    sent=120,
    received=34,
    duration_ms=12.4,
    at=1700000000.25,
)


def test_a_finished_connection_as_text() -> None:
    assert access_log.text_line(OUT, ends(OUT)) == (
        "2023-11-14T22:13:20.250000Z\tinfo\taccess\tconnection complete\t"
        'src.addr=10.0.0.1:40000 src.workload="web-1" src.namespace="shop" '
        f'src.identity="{spiffe("web")}" src.cluster="Kubernetes" '
        "dst.addr=10.0.0.2:8080 dst.hbone_addr=10.0.0.2:15008 "
        'dst.service="cart.shop.svc.cluster.local" dst.workload="cart-1" dst.namespace="shop" '
        f'dst.identity="{spiffe("cart")}" dst.cluster="Kubernetes" '
        'direction="outbound" bytes_sent=120 bytes_recv=34 duration="12ms"'
    )


def test_a_finished_connection_as_json_has_the_same_fields_in_the_same_order() -> None:
    found = json.loads(access_log.json_line(OUT, ends(OUT)))
    assert list(found) == [
        "level",
        "time",
        "scope",
        "message",
        "src.addr",
        "src.workload",
        "src.namespace",
        "src.identity",
        "src.cluster",
        "dst.addr",
        "dst.hbone_addr",
        "dst.service",
        "dst.workload",
        "dst.namespace",
        "dst.identity",
        "dst.cluster",
        "direction",
        "bytes_sent",
        "bytes_recv",
        "duration",
    ]
    assert (found["level"], found["scope"], found["bytes_sent"]) == ("info", "access", 120)


DENIALS = [
    ({"policy": "shop/no-web", "error": "policy"}, "explicitly denied by: shop/no-web"),
    (
        {"policy": "istio-system/istio_converted_static_strict", "error": "strict"},
        "explicitly denied by: istio-system/istio_converted_static_strict",
    ),
    ({"error": "default_deny"}, "allow policies exist, but none allowed"),
    ({"error": "unknown_destination"}, "unknown_destination"),
]


@pytest.mark.parametrize(("more", "reason"), DENIALS)
def test_a_denial_is_an_error_with_the_policys_name(more: dict[str, str], reason: str) -> None:
    found = event("denied", reporter="destination", local="uid-cart-1", flags="DENY", at=1.0, **more)
    line = access_log.text_line(found, ends(found))
    assert line.split("\t")[1:4] == ["error", "access", "connection complete"]
    assert line.endswith(f'error="connection closed due to policy rejection: {reason}"')
    assert 'direction="inbound"' in line
    assert json.loads(access_log.json_line(found, ends(found)))["error"].endswith(reason)


LEVELS = [
    ("opened", {}, "debug", "connection opened"),
    ("closed", {}, "info", "connection complete"),
    ("closed", {"error": "reset"}, "error", "connection complete"),
    ("failed", {"error": "connect: ECONNREFUSED"}, "warn", "connection failed"),
]


@pytest.mark.parametrize(("kind", "more", "level", "message"), LEVELS)
def test_each_event_has_its_level_and_message(kind: str, more: dict[str, str], level: str, message: str) -> None:
    found = event(kind, at=1.0, **more)
    assert access_log.text_line(found, ends(found)).split("\t")[1:4] == [level, "access", message]


def test_openings_are_logged_at_debug_only_and_progress_never(monkeypatch: pytest.MonkeyPatch) -> None:
    log = logging.getLogger(access_log.SCOPE)
    monkeypatch.setattr(log, "level", logging.INFO)
    log.manager._clear_cache()  # type: ignore[attr-defined]
    opened, moved = event("opened"), event("progress")
    assert access_log.line(opened, ends(opened), "text") is None
    assert access_log.line(OUT, ends(OUT), "text") == access_log.text_line(OUT, ends(OUT))
    assert access_log.line(OUT, ends(OUT), "json") == access_log.json_line(OUT, ends(OUT))
    log.setLevel(logging.DEBUG)
    assert "bytes_sent" not in (access_log.line(opened, ends(opened), "text") or "bytes_sent")
    assert access_log.line(moved, ends(moved), "text") is None
    log.setLevel(logging.NOTSET)


def test_what_is_not_known_is_left_out_and_what_a_peer_says_cannot_forge_a_line() -> None:
    found = event(
        "closed",
        reporter="destination",
        local="uid-cart-1",
        source_address="192.0.2.1:1",
        source_identity="",
        protocol="tcp",
        destination_identity="",
        error='x" bytes_sent=9\nforged',
        at=1.0,
    )
    line = access_log.text_line(found, ends(found))
    assert "src.workload" not in line and "src.identity" not in line and "dst.identity" not in line
    assert "\n" not in line and line.endswith('error="x\\" bytes_sent=9\\nforged"')


def test_other_lines_have_the_same_shape() -> None:
    record = logging.LogRecord("ztunnel", logging.WARNING, "f", 1, "a\nb %s", ("c",), None)
    record.created = 0.0
    assert Line("text").format(record) == "1970-01-01T00:00:00.000000Z\twarn\tztunnel\ta\\nb c"
    assert json.loads(Line("json").format(record)) == {
        "level": "warn",
        "time": "1970-01-01T00:00:00.000000Z",
        "scope": "ztunnel",
        "message": "a\nb c",
    }
    assert timestamp(0.9999999) == "1970-01-01T00:00:01.000000Z"
