"""From measurements to medians, spreads, ratios and targets: what `ambient bench` prints and keeps. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ambient.bench.plan import PATHS, WORKS, Metric, Path, Work

Row = dict[str, Any]
REDIRECTED_SHARE_MIN: Final = 0.5
REDIRECTED_WORKS: Final = ("stream_1k", "stream_16k", "stream_128k")
"""Small messages in a row go natively mostly; then the row is not about redirection, and the run says so."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One work on one path, once. ``values`` by key of a metric, and whatever else was seen."""

    round: int
    work: str
    path: str
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Target:
    """The ratio of a metric to that of another path, and what it is meant to be."""

    path: str
    work: str
    metric: str
    other: str
    aim: float
    at_least: bool

    @property
    def title(self) -> str:
        word = ">=" if self.at_least else "<="
        return f"{self.path} {self.work} {self.metric} {word} {self.aim:g} x {self.other}"


_REDIRECT, _DIRECT, _ACROSS, _ENVOY = "mesh_redirect", "mesh_direct", "mesh_across", "envoy_across"
TARGETS: Final = (
    Target(_REDIRECT, "rtt_1", "p50_us", "none_same", 0.6, False),
    Target(_REDIRECT, "stream_128k", "gbit_s", "none_same", 2.5, True),
    Target(_REDIRECT, "stream_1k", "gbit_s", "none_same", 1.0, True),
    Target(_REDIRECT, "http_32", "per_s", "none_same", 1.1, True),
    Target(_REDIRECT, "connect_1", "connect_p50_us", "none_same", 1.5, False),
    Target(_DIRECT, "rtt_1", "p50_us", "none_same", 1.05, False),
    Target(_DIRECT, "rtt_1k", "p50_us", "none_same", 1.05, False),
    Target(_DIRECT, "stream_128k", "gbit_s", "none_same", 0.95, True),
    Target(_DIRECT, "stream_1k", "gbit_s", "none_same", 0.95, True),
    Target(_DIRECT, "http_32", "per_s", "none_same", 0.95, True),
    Target(_DIRECT, "connect", "per_s", "none_same", 0.95, True),
    Target(_ACROSS, "http_1", "p50_us", "none_across", 1.75, False),
    Target(_ACROSS, "http_32", "per_s", "none_across", 0.35, True),
    Target(_ACROSS, "http_32", "per_s", _ENVOY, 1.2, True),
    Target(_ACROSS, "http_256", "per_s", "none_across", 0.35, True),
    Target(_ACROSS, "connect", "per_s", "none_across", 0.32, True),
    Target(_ACROSS, "stream_128k", "gbit_s", _ENVOY, 1.0, True),
)
MEMORY_TARGETS: Final = (("idle", "worker", 40.0), ("thousand", "worker", 60.0), ("idle", "control", 70.0))


class Report:
    """All measurements of a run."""

    def __init__(self, measurements: Iterable[Measurement]) -> None:
        self.measurements = tuple(measurements)
        self._values: dict[tuple[str, str, str], list[float]] = {}
        for m in self.measurements:
            for key, value in m.values.items():
                self._values.setdefault((m.path, m.work, key), []).append(value)

    def values(self, path: str, work: str, metric: str) -> list[float]:
        return self._values.get((path, work, metric), [])

    def median(self, path: str, work: str, metric: str) -> float | None:
        found = self.values(path, work, metric)
        return statistics.median(found) if found else None

    def ratio(self, path: str, work: str, metric: str, other: str) -> float | None:
        """Median of one path over that of the other; None if one was not measured or is nothing."""
        ours, theirs = self.median(path, work, metric), self.median(other, work, metric)
        return ours / theirs if ours is not None and theirs else None

    def rows(self) -> list[Row]:
        """One row for each work, metric and path that was measured."""
        return [
            row for work in WORKS for metric in work.metrics for path in PATHS if (row := self._row(work, metric, path))
        ]

    def _row(self, work: Work, metric: Metric, path: Path) -> Row | None:
        values = self.values(path.name, work.name, metric.key)
        if not values:
            return None
        native, redirected = (
            sum(self.values(path.name, work.name, key)) for key in ("native_bytes", "redirected_bytes")
        )
        ratio = self.ratio(path.name, work.name, metric.key, path.base)
        row: Row = {
            "work": work.name,
            "path": path.name,
            "metric": metric.key,
            "unit": metric.unit,
            "median": rounded(statistics.median(values)),
            "min": rounded(min(values)),
            "max": rounded(max(values)),
            "spread": rounded((max(values) - min(values)) / statistics.median(values)) if any(values) else 0.0,
            "runs": len(values),
            "ratio": rounded(ratio) if ratio is not None else None,
            "better": "lower" if metric.lower else "higher",
        }
        if path.acceleration:
            row |= {"redirected_bytes": int(redirected), "native_bytes": int(native)}
        return row

    def targets(self) -> list[Row]:
        """Each target that was measured, and whether it is met."""
        rows: list[Row] = []
        for target in TARGETS:
            found = self.ratio(target.path, target.work, target.metric, target.other)
            if found is not None:
                met = found >= target.aim if target.at_least else found <= target.aim
                rows.append({"target": target.title, "measured": rounded(found), "aim": target.aim, "met": met})
        return rows

    def failures(self) -> list[str]:
        """What makes a run worthless: errors, and a stream called redirected that was not."""
        found: list[str] = []
        for m in self.measurements:
            if m.values.get("errors"):
                found.append(f"{m.work} on {m.path}, round {m.round + 1}: {m.values['errors']:g} errors")
            moved, native = m.values.get("redirected_bytes"), m.values.get("native_bytes", 0.0)
            if m.path == _REDIRECT and m.work in REDIRECTED_WORKS and moved is not None:
                share = moved / (moved + native) if moved + native else 0.0
                if share < REDIRECTED_SHARE_MIN:
                    found.append(f"{m.work} on {m.path}, round {m.round + 1}: only {share:.0%} was redirected")
        return found


def memory_targets(memory: Mapping[str, Sequence[Row]]) -> list[Row]:
    """The largest process of each kind, idle and with 1,000 idle connections, against what it is meant to hold."""
    rows: list[Row] = []
    for state, role, aim in MEMORY_TARGETS:
        found = [row["rss_mb"] for row in memory.get(state, ()) if row["role"] == role]
        if found:
            title = f"ztunnel {role} resident, {state.replace('thousand', '1,000 idle connections')} <= {aim:g} MB"
            rows.append({"target": title, "measured": max(found), "aim": aim, "met": max(found) <= aim})
    return rows


def rounded(value: float) -> float:
    """Four digits that matter."""
    return float(f"{value:.4g}")
