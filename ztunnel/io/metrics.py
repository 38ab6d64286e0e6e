"""Istio's TCP metrics, by prometheus-client.

The children of a connection's metrics are bound once, when it opens, and used without any look-up for each of its
events. The number of label sets is limited; a set goes some minutes after the last workload of either of its
ends left the World and its last connection closed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from msgspec.structs import replace
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from ztunnel.core.attributes import UNKNOWN, Ends, Party
from ztunnel.core.messages import ConnectionEvent

SERIES_MAX: Final = 10_000
"""Label sets of connections; connections beyond count in ambient_metric_series_dropped_total only."""
SERIES_GRACE_S: Final = 300.0
"""How long a set stays after its workloads vanished: some scrapes, so that the last values are seen."""
WORKER_COUNTERS_MAX: Final = 512

LABELS: Final = (
    "reporter",
    *(
        f"source_{name}"
        for name in (
            "workload",
            "canonical_service",
            "canonical_revision",
            "workload_namespace",
            "principal",
            "app",
            "version",
            "cluster",
        )
    ),
    *(
        f"destination_{name}"
        for name in (
            "service",
            "service_namespace",
            "service_name",
            "workload",
            "canonical_service",
            "canonical_revision",
            "workload_namespace",
            "principal",
            "app",
            "version",
            "cluster",
        )
    ),
    "request_protocol",
    "response_flags",
    "connection_security_policy",
    "source_region",
    "source_zone",
    "destination_region",
    "destination_zone",
)
Labels = tuple[str, ...]
SECURITY_POLICY: Final = {"hbone": "mutual_tls", "kernel": "kernel"}
"""Of an event's protocol: a flow within the node is authorized by the kernel and not encrypted."""


def product_version() -> str:
    """As installed; unknown when run from a source tree."""
    try:
        return version("ambient")
    except PackageNotFoundError:
        return UNKNOWN


def labels_of(event: ConnectionEvent, ends: Ends) -> Labels:
    """Values of `LABELS`; what is not known is ``unknown``."""
    source, destination = ends.source, ends.destination
    values = (
        event.reporter,
        *_party(source),
        ends.service_host,
        ends.service_namespace,
        ends.service_name,
        *_party(destination),
        "tcp",
        event.flags or "-",
        SECURITY_POLICY.get(event.protocol, UNKNOWN),
        source.region,
        source.zone,
        destination.region,
        destination.zone,
    )
    return tuple(value or UNKNOWN for value in values)


def _party(party: Party) -> tuple[str, ...]:
    return (
        party.workload,
        party.canonical_service,
        party.canonical_revision,
        party.namespace,
        party.principal,
        party.canonical_service,
        party.canonical_revision,
        party.cluster,
    )


@dataclass(slots=True)
class _Series:
    """One label set: its children, who is open on it, and whose it is."""

    opened: Counter
    closed: Counter
    sent: Counter
    received: Counter
    failed: Counter
    connections: int = 0
    sources: set[str] = field(default_factory=set)
    destinations: set[str] = field(default_factory=set)
    vanished_at: float | None = None


@dataclass(slots=True)
class Bound:
    """An open connection's place in the metrics."""

    event: ConnectionEvent
    ends: Ends
    labels: Labels
    series: _Series | None
    sent: int = 0
    received: int = 0
    """Totals of the connection so far."""


class Metrics:
    """One registry, that of the control process."""

    def __init__(self, series_max: int = SERIES_MAX) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._series_max = series_max
        self._series: dict[Labels, _Series] = {}
        self._by_uid: dict[str, set[Labels]] = {}
        self._vanished: set[Labels] = set()
        self._bound: dict[tuple[int, int], Bound] = {}
        self._names: set[str] = set()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        self._opened = counter("istio_tcp_connections_opened", "TCP connections opened", LABELS)
        self._closed = counter("istio_tcp_connections_closed", "TCP connections closed", LABELS)
        self._sent = counter("istio_tcp_sent_bytes", "Bytes sent to the destination", LABELS)
        self._received = counter("istio_tcp_received_bytes", "Bytes received from the destination", LABELS)
        self._failed = counter("istio_tcp_connections_failed", "TCP connections denied or failed", LABELS)
        self._open = Gauge("istio_tcp_sockets_open", "Open connections", ("reporter",), registry=self.registry)
        self._dropped = counter("ambient_metric_series_dropped", "Connections not counted: too many label sets")
        self._series_gauge = Gauge("ambient_metric_series", "Label sets of connections", registry=self.registry)
        self._worker = counter("ambient_ztunnel_events", "Counters of ztunnel's processes, by name", ("name",))
        self.dns_requests = counter("istio_dns_requests", "DNS queries from pods")
        self.dns_upstream_requests = counter("istio_dns_upstream_requests", "DNS queries forwarded")
        self.dns_upstream_failures = counter("istio_dns_upstream_failures", "DNS queries no upstream answered")
        self.dns_upstream_seconds = Histogram(
            "istio_dns_upstream_request_duration_seconds",
            "Time to an upstream's answer",
            registry=self.registry,
            buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0),
        )
        self.xds_messages = counter("istio_xds_message", "Discovery updates applied", ("url",))
        self.xds_terminations = counter("istio_xds_connection_terminations", "Discovery streams ended", ("reason",))
        self.pods = Gauge("workload_manager_active_proxy_count", "Pods served", registry=self.registry)
        self.restarts = counter("workload_manager_proxies_started", "Pods taken on")
        self.stops = counter("workload_manager_proxies_stopped", "Pods given up")
        build = Gauge("istio_build", "Component and version", ("component", "tag"), registry=self.registry)
        build.labels("ztunnel", product_version()).set(1)

    def open_connection(self, worker: int, connection: int) -> Bound | None:
        return self._bound.get((worker, connection))

    def record(self, worker: int, event: ConnectionEvent, ends: Ends | None) -> Bound:
        """Count one event; returns the connection's place, with its totals so far.

        ``ends`` may be None for an event of a connection that was opened here. A connection whose opening was
        not seen (it is older than this process) counts as opened now.
        """
        key = (worker, event.connection)
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bind(event, ends or Ends())
            if event.event in ("denied", "failed"):
                if bound.series is not None:
                    bound.series.failed.inc()
                return bound
            self._bound[key] = bound
            self._open.labels(event.reporter or UNKNOWN).inc()
            if bound.series is not None:
                bound.series.opened.inc()
                bound.series.connections += 1
        bound.sent += max(0, event.sent)
        bound.received += max(0, event.received)
        series = bound.series
        if series is not None:
            if event.sent > 0:
                series.sent.inc(event.sent)
            if event.received > 0:
                series.received.inc(event.received)
        if event.event in ("closed", "denied", "failed"):
            self._close(key, bound, event)
        return bound

    def record_ended(self, event: ConnectionEvent, ends: Ends, count: int, sent: int, received: int) -> None:
        """Count so many connections alike, whose opening was not told: opened and closed, with their bytes in all."""
        series = self._bind(event, ends).series
        if series is None:
            self._dropped.inc(count - 1)  # one was counted just now
            return
        series.opened.inc(count)
        series.closed.inc(count)
        if sent > 0:
            series.sent.inc(sent)
        if received > 0:
            series.received.inc(received)

    def worker_gone(self, worker: int) -> None:
        """Its connections ended with it."""
        for key, bound in [(k, b) for k, b in self._bound.items() if k[0] == worker]:
            self._close(key, bound, bound.event)

    def add_counters(self, deltas: dict[str, int]) -> None:
        """A process's own counters; names beyond a limit, and what is no count, are left out."""
        for name, delta in deltas.items():
            if delta <= 0 or len(name) > 200:
                continue
            if name not in self._names:
                if len(self._names) >= WORKER_COUNTERS_MAX:
                    continue
                self._names.add(name)
            self._worker.labels(name).inc(delta)

    def workloads_vanished(self, uids: set[str], now: float) -> None:
        """These workloads left the World; `sweep` removes what is only theirs after `SERIES_GRACE_S`."""
        for uid in uids:
            for labels in self._by_uid.pop(uid, set()):
                series = self._series.get(labels)
                if series is None:
                    continue
                for side in (series.sources, series.destinations):
                    if uid in side:
                        side.discard(uid)
                        if not side:
                            series.vanished_at = now
                            self._vanished.add(labels)

    def sweep(self, now: float) -> int:
        """Remove label sets whose workloads vanished; how many went."""
        gone = [
            labels
            for labels in self._vanished
            if (series := self._series[labels]).connections == 0
            and series.vanished_at is not None
            and now - series.vanished_at >= SERIES_GRACE_S
        ]
        for labels in gone:
            self._vanished.discard(labels)
            series = self._series.pop(labels)
            for uid in series.sources | series.destinations:
                if uid in self._by_uid:
                    self._by_uid[uid].discard(labels)
            for metric in (self._opened, self._closed, self._sent, self._received, self._failed):
                metric.remove(*labels)
        self._series_gauge.set(len(self._series))
        return len(gone)

    def render(self) -> bytes:
        """The text exposition format."""
        self._series_gauge.set(len(self._series))
        return generate_latest(self.registry)

    def _bind(self, event: ConnectionEvent, ends: Ends) -> Bound:
        labels = labels_of(event, ends)
        series = self._series.get(labels)
        if series is None:
            if len(self._series) >= self._series_max:
                self._dropped.inc()
                return Bound(event, ends, labels, None)
            series = self._series[labels] = _Series(
                self._opened.labels(*labels),
                self._closed.labels(*labels),
                self._sent.labels(*labels),
                self._received.labels(*labels),
                self._failed.labels(*labels),
            )
        for side, uid in ((series.sources, ends.source.uid), (series.destinations, ends.destination.uid)):
            if uid and uid not in side:
                side.add(uid)
                self._by_uid.setdefault(uid, set()).add(labels)
        if series.vanished_at is not None:  # in use again, by another pod of the same workload
            series.vanished_at = None
            self._vanished.discard(labels)
        return Bound(event, ends, labels, series)

    def _close(self, key: tuple[int, int], bound: Bound, event: ConnectionEvent) -> None:
        del self._bound[key]
        self._open.labels(bound.event.reporter or UNKNOWN).dec()
        series = bound.series
        if series is None:
            return
        series.connections -= 1
        flags = event.flags or "-"
        if flags == (bound.event.flags or "-"):
            series.closed.inc()
        else:  # it ended otherwise than it began: the close counts under its own flags, as Istio's does
            ended = self._bind(replace(bound.event, flags=flags), bound.ends)
            if ended.series is not None:
                ended.series.closed.inc()
