"""Flows of the kernel that ended are told in groups: the same numbers and lines as one by one."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambient.datapath.values import FlowEnd, FlowEvent, FlowValue, TupleKey
from ambient.settings import NodeSettings
from tests.support.shop import NODE
from tests.ztunnel_control.test_metrics import LOCAL, WORLD, event, samples, value
from ztunnel.core.attributes import describe
from ztunnel.core.messages import ConnectionEvent
from ztunnel.io import access_log
from ztunnel.io.control import Control
from ztunnel.io.kernel_flows import KernelFlows
from ztunnel.io.metrics import Metrics

END = FlowEnd(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0)
NETNS = {"web": next(iter(LOCAL.pods.values())).netns_cookie}


def ended(cookie: int, sent: int = 0, received: int = 0, port: int = 80, **more: Any) -> FlowEvent:
    """From web-1 to cart-1, as the kernel reports it; ``received`` is half redirected."""
    key = TupleKey("10.0.0.2", more.pop("client", "10.0.0.1"), port, 40000 + cookie)
    half = received // 2
    values: dict[str, Any] = {
        "client": replace(END, cookie=cookie, native_bytes=sent),
        "server": replace(END, cookie=cookie + 1_000_000, native_bytes=received - half, redirect_bytes=half),
        "created_ns": 10_000_000,
        "generation": 3,
        "netns_client": NETNS["web"],
        "netns_server": 99,
        "original": "10.96.0.10",
        "source": 1,
        "destination": 2,
        "identity": 1,
        "policy": 0,
        "original_port": 80,
        "reason": 23,
        "acceleration": 1,
        "flags": 0,
    }
    return FlowEvent(key, FlowValue(**{**values, **more}), 10_000_000 + cookie * 1_000_000)


class Told:
    """A control process's metrics and log lines, without a control process."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, form: str = "text") -> None:
        self.lines: list[str] = []
        settings = NodeSettings(node_name=NODE, run_dir=str(directory), log_format=form)
        self.control = Control(settings)
        self.control._decisions.world = WORLD
        self.control._decisions.local = LOCAL
        monkeypatch.setattr("ztunnel.io.logs.write", lambda text: self.lines.extend(text.splitlines()))
        self.flows: KernelFlows = self.control._flows

    @property
    def metrics(self) -> Metrics:
        return self.control._metrics


@pytest.fixture(autouse=True)
def level() -> Iterator[None]:
    logging.getLogger(access_log.SCOPE).setLevel(logging.INFO)
    yield
    logging.getLogger(access_log.SCOPE).setLevel(logging.NOTSET)


def counted(metrics: Metrics) -> dict[str, Counter[tuple[Any, ...]]]:
    names = ("connections_opened", "connections_closed", "sent_bytes", "received_bytes", "connections_failed")
    return {
        name: Counter({tuple(sorted(labels.items())): v for labels, v in samples(metrics, f"istio_tcp_{name}_total")})
        for name in names
    }


MANY = [ended(n, n, 2 * n) for n in range(1, 40)] + [
    ended(50, 7, 0, port=8080),
    ended(51, 7, 1, original="10.0.0.2"),
    ended(52, 7, 1, client="10.0.0.9", netns_client=4711),
    ended(53, 0, 0, server=replace(END, cookie=0)),
]


@pytest.mark.parametrize("form", ["text", "json"])
def test_groups_count_and_log_what_one_by_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr("time.time", lambda: 1700000000.25)
    together = Told(tmp_path, monkeypatch, form)
    together.flows._ended([e.encode() for e in MANY])
    single = Told(tmp_path, monkeypatch, form)
    for e in MANY:
        single.flows._tell(single.flows._closed(e.key, e.value, e.closed_ns))
    assert counted(together.metrics) == counted(single.metrics)
    assert value(together.metrics, "istio_tcp_connections_closed_total") == 2 * 42
    assert value(together.metrics, "istio_tcp_sockets_open") == 0
    assert sorted(together.lines) == sorted(single.lines)
    assert len(together.lines) == 2 * 42 + 1


def test_a_flow_told_of_while_it_lived_is_not_opened_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(tmp_path, monkeypatch)
    living = ended(5, 100, 10)
    told.flows._tell(told.flows._progress(living.key, living.value, 60, 5, 20_000_000))
    told.flows._ended([living.encode(), ended(6, 1, 1).encode()])
    assert value(told.metrics, "istio_tcp_connections_opened_total") == 4
    assert value(told.metrics, "istio_tcp_connections_closed_total") == 4
    assert value(told.metrics, "istio_tcp_sent_bytes_total") == 2 * 101


def test_a_socket_that_is_used_again_is_another_flow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disconnected by AF_UNSPEC and connected anew, while its first server has not closed yet: one cookie."""
    told = Told(tmp_path, monkeypatch)
    first, second = ended(5, 100, 10), ended(5, 30, 3, created_ns=11_000_000)
    for living, sent, received in ((first, 60, 5), (second, 20, 2)):
        told.flows._tell(told.flows._progress(living.key, living.value, sent, received, 20_000_000))
    told.flows._save()
    assert set(told.flows._load()) == {(5, 10_000_000), (5, 11_000_000)}
    told.flows._ended([first.encode(), second.encode()])
    assert value(told.metrics, "istio_tcp_connections_opened_total") == 4
    assert value(told.metrics, "istio_tcp_connections_closed_total") == 4
    assert value(told.metrics, "istio_tcp_sent_bytes_total") == 2 * 130
    assert value(told.metrics, "istio_tcp_received_bytes_total") == 2 * 13


@pytest.mark.parametrize("told_before", [True, False])
def test_a_flow_that_lost_its_server_to_the_next_one_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told_before: bool
) -> None:
    """Its addresses were used again before its server closed; only the server had sent, or nobody."""
    told = Told(tmp_path, monkeypatch)
    if told_before:
        living = ended(5)
        told.flows._tell(told.flows._progress(living.key, living.value, 0, 0, 20_000_000))
    received = 0 if told_before else 9
    told.flows._ended([ended(5, 0, server=replace(END, cookie=0, native_bytes=received)).encode()])
    assert value(told.metrics, "istio_tcp_connections_closed_total") == 2
    assert value(told.metrics, "istio_tcp_received_bytes_total") == 2 * received
    assert value(told.metrics, "istio_tcp_sockets_open") == 0
    assert "kernel_connect_failed" not in told.flows.counters


def test_a_group_is_made_anew_when_names_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(tmp_path, monkeypatch)
    told.flows._ended([ended(1).encode()])
    other = msgspec.structs.replace(LOCAL.pods["uid-cart-1"], name="cart-2", workload_uid="Kubernetes//Pod/shop/cart-2")
    told.control._decisions.local = LOCAL.put(other)
    told.flows._ended([ended(2).encode()])
    assert 'dst.workload="cart-1"' in told.lines[1]
    assert 'dst.workload="cart-1"' not in told.lines[3]


def test_an_unreadable_record_is_counted_and_the_rest_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(tmp_path, monkeypatch)

    def refuse(raw: bytes) -> Any:
        raise ValueError("no")

    whole = ended(1).encode()
    monkeypatch.setattr(told.flows._groups, "_make", refuse)
    monkeypatch.setattr(told.flows, "_closed", lambda *_: refuse(b""))
    told.flows._ended([whole])
    assert told.flows.counters == {"kernel_flow_unreadable": 1}
    assert not told.lines


def test_each_opening_has_a_line_at_debug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logging.getLogger(access_log.SCOPE).setLevel(logging.DEBUG)
    told = Told(tmp_path, monkeypatch)
    told.flows._ended([ended(1).encode()])
    assert [("connection opened" in line, "connection complete" in line) for line in told.lines] == [
        (True, False),
        (True, False),
        (False, True),
        (False, True),
    ]


@given(
    st.text(max_size=20),
    st.integers(1, 65535),
    st.integers(0, 2**63),
    st.integers(0, 10**9),
    st.sampled_from(["10.0.0.1", "[fd00::1]"]),
)
def test_a_template_gives_the_very_line(policy: str, port: int, count: int, ms: int, host: str) -> None:
    found: ConnectionEvent = event(
        "closed",
        source_address=f"{host}:{port}",
        policy=policy,
        source_identity=policy,
        protocol="kernel",
        sent=count,
        received=count + 1,
        duration_ms=float(ms),
        at=1700000000.25,
    )
    ends = describe(WORLD, LOCAL, found)
    values = ("2023-11-14T22:13:20.250000Z", port, count, count + 1, ms)
    assert access_log.template(found, ends, "text") % values == access_log.text_line(found, ends) + "\n"
    line = access_log.template(found, ends, "json") % values
    assert line == access_log.json_line(found, ends) + "\n"
    assert json.loads(line)["bytes_sent"] == count
