"""Istio's TCP metrics: values, labels, limits, and what goes when its workloads go."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ambient.model.workload import Locality
from ambient.model.world import World
from tests.support.shop import NODE, pod, serves, service, spiffe, workload
from ztunnel.core.attributes import KEPT_MAX, Descriptions, Ends, Party, describe
from ztunnel.core.local import Local
from ztunnel.core.messages import ConnectionEvent
from ztunnel.io.metrics import LABELS, SERIES_GRACE_S, Metrics

LOCAL = Local.of(NODE, [pod("web-1", "10.0.0.1"), pod("cart-1", "10.0.0.2")])
WORLD = World.of(
    [
        workload("web-1", "10.0.0.1", canonical_revision="v2"),
        workload("cart-1", "10.0.0.2", services=serves("cart"), locality=Locality("eu", "eu-1")),
        workload("cart-2", "10.0.0.3", services=serves("cart")),
    ],
    [service("cart", "10.96.0.10")],
)
CART_UID, WEB_UID = "Kubernetes//Pod/shop/cart-1", "Kubernetes//Pod/shop/web-1"


def event(kind: str, connection: int = 1, **more: Any) -> ConnectionEvent:
    values: dict[str, Any] = {
        "connection": connection,
        "event": kind,
        "reporter": "source",
        "local": "uid-web-1",
        "source_address": "10.0.0.1:40000",
        "destination_address": "10.0.0.2:8080",
        "service": "shop/cart.shop.svc.cluster.local",
        "destination": CART_UID,
        "source_identity": spiffe("web"),
        "destination_identity": spiffe("cart"),
        "protocol": "hbone",
    }
    return ConnectionEvent(**{**values, **more})


def record(metrics: Metrics, found: ConnectionEvent, worker: int = 1) -> None:
    metrics.record(worker, found, describe(WORLD, LOCAL, found))


def samples(metrics: Metrics, name: str) -> list[tuple[dict[str, str], float]]:
    return [
        (dict(s.labels), s.value)
        for family in text_string_to_metric_families(metrics.render().decode())
        for s in family.samples
        if s.name == name
    ]


def value(metrics: Metrics, name: str) -> float:
    return sum(v for _, v in samples(metrics, name))


def test_a_connection_counts_in_each_metric() -> None:
    metrics = Metrics()
    record(metrics, event("opened"))
    assert value(metrics, "istio_tcp_sockets_open") == 1
    record(metrics, event("progress", sent=100, received=10))
    record(metrics, event("closed", sent=1, received=2))
    assert value(metrics, "istio_tcp_connections_opened_total") == 1
    assert value(metrics, "istio_tcp_connections_closed_total") == 1
    assert value(metrics, "istio_tcp_sent_bytes_total") == 101
    assert value(metrics, "istio_tcp_received_bytes_total") == 12
    assert value(metrics, "istio_tcp_sockets_open") == 0
    assert value(metrics, "istio_tcp_connections_failed_total") == 0


def test_the_labels_are_istios_and_say_who_talks_to_whom() -> None:
    metrics = Metrics()
    record(metrics, event("opened"))
    ((labels, _),) = samples(metrics, "istio_tcp_connections_opened_total")
    assert tuple(sorted(labels)) == tuple(sorted(LABELS))
    assert labels == {
        "reporter": "source",
        "source_workload": "web",
        "source_canonical_service": "web",
        "source_canonical_revision": "v2",
        "source_workload_namespace": "shop",
        "source_principal": spiffe("web"),
        "source_app": "web",
        "source_version": "v2",
        "source_cluster": "Kubernetes",
        "source_region": "unknown",
        "source_zone": "unknown",
        "destination_service": "cart.shop.svc.cluster.local",
        "destination_service_namespace": "shop",
        "destination_service_name": "cart",
        "destination_workload": "cart",
        "destination_canonical_service": "cart",
        "destination_canonical_revision": "latest",
        "destination_workload_namespace": "shop",
        "destination_principal": spiffe("cart"),
        "destination_app": "cart",
        "destination_version": "latest",
        "destination_cluster": "Kubernetes",
        "destination_region": "eu",
        "destination_zone": "eu-1",
        "request_protocol": "tcp",
        "response_flags": "-",
        "connection_security_policy": "mutual_tls",
    }


def test_the_destination_finds_the_service_by_the_port_and_the_source_by_its_address() -> None:
    metrics = Metrics()
    inbound = {"reporter": "destination", "local": "uid-cart-1", "service": "", "destination": ""}
    record(metrics, event("opened", **inbound))
    ((labels, _),) = samples(metrics, "istio_tcp_connections_opened_total")
    assert (labels["source_workload"], labels["destination_workload"]) == ("web", "cart")
    assert labels["destination_service_name"] == "cart"
    other = Metrics()
    record(other, event("opened", **inbound, destination_address="10.0.0.2:9999"))
    ((labels, _),) = samples(other, "istio_tcp_connections_opened_total")
    assert labels["destination_service"] == "unknown"


def test_an_address_does_not_speak_for_an_identity_that_it_is_not() -> None:
    found = event(
        "opened", reporter="destination", local="uid-cart-1", source_identity=spiffe("eve", "dark"), destination=""
    )
    source = describe(WORLD, LOCAL, found).source
    assert source == Party(namespace="dark", principal=spiffe("eve", "dark"))


def test_plaintext_from_outside_is_unknown() -> None:
    metrics = Metrics()
    record(
        metrics,
        event(
            "opened",
            reporter="destination",
            local="uid-cart-1",
            source_address="192.0.2.1:1",
            source_identity="",
            protocol="tcp",
        ),
    )
    ((labels, _),) = samples(metrics, "istio_tcp_connections_opened_total")
    assert labels["source_workload"] == labels["source_principal"] == "unknown"
    assert labels["connection_security_policy"] == "unknown"


def test_a_denied_connection_failed_and_was_never_open() -> None:
    metrics = Metrics()
    record(metrics, event("denied", flags="DENY"))
    record(metrics, event("failed", 2, flags="CONNECT"))
    found = {labels["response_flags"]: v for labels, v in samples(metrics, "istio_tcp_connections_failed_total")}
    assert found == {"DENY": 1, "CONNECT": 1}
    assert value(metrics, "istio_tcp_connections_opened_total") == 0
    assert value(metrics, "istio_tcp_sockets_open") == 0


def test_a_connection_that_lost_its_right_closes_under_its_flag() -> None:
    metrics = Metrics()
    record(metrics, event("opened"))
    record(metrics, event("closed", flags="DENY", error="policy change"))
    found = {labels["response_flags"]: v for labels, v in samples(metrics, "istio_tcp_connections_closed_total")}
    assert found == {"-": 0, "DENY": 1}


def test_connections_of_different_workers_are_different() -> None:
    metrics = Metrics()
    record(metrics, event("opened"), worker=1)
    record(metrics, event("opened"), worker=2)
    assert value(metrics, "istio_tcp_sockets_open") == 2
    metrics.worker_gone(1)
    assert value(metrics, "istio_tcp_sockets_open") == 1
    assert value(metrics, "istio_tcp_connections_closed_total") == 1


def test_a_connection_older_than_this_process_counts_as_opened_now() -> None:
    metrics = Metrics()
    record(metrics, event("progress", sent=5))
    record(metrics, event("closed"))
    assert value(metrics, "istio_tcp_connections_opened_total") == 1
    assert value(metrics, "istio_tcp_sockets_open") == 0


def test_the_children_of_a_pair_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    record(metrics, event("opened", 1))
    record(metrics, event("opened", 2))
    looked: list[Any] = []
    kind = type(metrics._opened)
    original = kind.labels
    monkeypatch.setattr(kind, "labels", lambda self, *a, **k: (looked.append(a), original(self, *a, **k))[1])
    for number in (1, 2):
        for _ in range(50):
            metrics.record(1, event("progress", number, sent=1), None)
    assert looked == []
    assert value(metrics, "istio_tcp_sent_bytes_total") == 100


def test_label_sets_are_limited_and_what_is_beyond_is_counted() -> None:
    metrics = Metrics(series_max=2)
    for number in range(4):
        found = event("opened", number)
        metrics.record(1, found, Ends(source=Party(workload=f"w{number}")))
    assert len(samples(metrics, "istio_tcp_connections_opened_total")) == 2
    assert value(metrics, "ambient_metric_series_dropped_total") == 2
    assert value(metrics, "ambient_metric_series") == 2
    for number in range(4):
        metrics.record(1, event("closed", number), None)
    assert value(metrics, "istio_tcp_sockets_open") == 0


def test_series_of_vanished_workloads_go_once_scraped_and_closed() -> None:
    metrics = Metrics()
    record(metrics, event("opened"))
    metrics.workloads_vanished({CART_UID}, 100.0)
    assert metrics.sweep(100.0 + SERIES_GRACE_S) == 0, "a connection is still open on it"
    record(metrics, event("closed"))
    assert metrics.sweep(100.0 + SERIES_GRACE_S - 1) == 0
    assert metrics.sweep(100.0 + SERIES_GRACE_S) == 1
    assert samples(metrics, "istio_tcp_connections_opened_total") == []
    record(metrics, event("opened", 2))
    assert value(metrics, "istio_tcp_connections_opened_total") == 1


def test_series_that_another_pod_of_the_workload_shares_stay() -> None:
    metrics = Metrics()
    for number, uid in enumerate((CART_UID, "Kubernetes//Pod/shop/cart-2")):
        found = event("opened", number, destination=uid)
        ends = describe(WORLD, LOCAL, event("opened", destination=CART_UID))
        shared = Ends(ends.source, Party(**{**_fields(ends.destination), "uid": uid}), ends.service_host)
        metrics.record(1, found, shared)
        metrics.record(1, event("closed", number), None)
    metrics.workloads_vanished({CART_UID}, 0.0)
    assert metrics.sweep(SERIES_GRACE_S) == 0
    metrics.workloads_vanished({"Kubernetes//Pod/shop/cart-2"}, 0.0)
    assert metrics.sweep(SERIES_GRACE_S) == 1


def test_a_series_that_is_used_again_in_time_stays() -> None:
    metrics = Metrics()
    record(metrics, event("denied"))
    metrics.workloads_vanished({WEB_UID}, 0.0)
    record(metrics, event("denied"))
    assert metrics.sweep(SERIES_GRACE_S) == 0
    metrics.workloads_vanished({WEB_UID}, SERIES_GRACE_S)
    assert metrics.sweep(2 * SERIES_GRACE_S) == 1


def _fields(party: Party) -> dict[str, str]:
    return {name: getattr(party, name) for name in Party.__dataclass_fields__}


def test_counters_of_workers_are_bounded_in_names_and_never_go_back() -> None:
    metrics = Metrics()
    metrics.add_counters({"tunnels": 2, "bad": -5, "x" * 201: 1})
    metrics.add_counters({"tunnels": 1, **{f"name-{n}": 1 for n in range(600)}})
    found = {labels["name"]: v for labels, v in samples(metrics, "ambient_ztunnel_events_total")}
    assert found["tunnels"] == 3 and len(found) == 512 and "bad" not in found


def test_a_label_cannot_break_the_exposition_format() -> None:
    metrics = Metrics()
    evil = 'x"\n} 1\nevil_total{a="'
    metrics.record(1, event("opened"), Ends(source=Party(workload=evil)))
    ((labels, _),) = samples(metrics, "istio_tcp_connections_opened_total")
    assert labels["source_workload"] == evil


def test_what_is_kept_of_ends_is_what_is_found_anew_and_never_outlives_the_world_it_was_read_from() -> None:
    kept = Descriptions()
    inbound = {"reporter": "destination", "local": "uid-cart-1", "destination": "", "service": ""}
    changes: list[dict[str, Any]] = [
        {},
        {"service": ""},
        {"destination": ""},
        {"destination": "", "destination_address": "10.0.0.3:8080"},
        {"destination_identity": spiffe("eve")},
        {"local": "uid-none"},
        inbound,
        {**inbound, "source_address": "10.0.0.3:40000"},
        {**inbound, "source_identity": spiffe("eve")},
        {**inbound, "destination_address": "10.0.0.2:9999"},
        {**inbound, "source_address": "[fd00::1]:40000"},
    ]
    empty = World.of([], [])
    for world, local in ((WORLD, LOCAL), (empty, LOCAL), (WORLD, Local.of(NODE)), (WORLD, LOCAL), (None, LOCAL)):
        for change in changes * 2:
            found = event("closed", **change)
            assert kept.describe(world, local, found) == describe(world, local, found), change
    assert kept.describe(WORLD, LOCAL, event("closed")) is kept.describe(
        WORLD, LOCAL, event("closed", source_address="10.0.0.1:40001")
    )
    for port in range(KEPT_MAX + 10):
        kept.describe(WORLD, LOCAL, event("closed", destination_address=f"10.0.0.9:{port}"))
        assert len(kept) <= KEPT_MAX
