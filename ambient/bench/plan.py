"""What is measured: paths (how two pods talk) and works (what they do), and in which order. Pure.

All paths of one work follow each other directly, and every other round goes backwards: whatever else the machine does
falls on all of them alike, so ratios within a run mean something where absolute numbers do not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ambient.errors import Misuse


@dataclass(frozen=True, slots=True)
class Path:
    """How the client's pod reaches the server's. ``base`` is the path without a mesh it is compared with."""

    name: str
    title: str
    mesh: bool
    across: bool
    base: str
    acceleration: str = ""
    """Annotation of the namespace; such a path is measured only if connections really take it."""
    envoy: bool = False

    @property
    def namespace(self) -> str:
        return self.name.replace("_", "-")


PATHS: Final = (
    Path("none_same", "no mesh, same node", False, False, "none_same"),
    Path("mesh_redirect", "mesh, same node, redirect", True, False, "none_same", "redirect"),
    Path("mesh_direct", "mesh, same node, direct", True, False, "none_same", "direct"),
    Path("mesh_off", "mesh, same node, off (ztunnel)", True, False, "none_same", "off"),
    Path("none_across", "no mesh, across nodes", False, True, "none_across"),
    Path("mesh_across", "mesh, across nodes (HBONE)", True, True, "none_across"),
    Path("envoy_across", "Envoy pair with mTLS, across nodes", False, True, "none_across", envoy=True),
)


@dataclass(frozen=True, slots=True)
class Metric:
    """``key`` is what the measurement calls it. ``lower`` is better for times, worse for rates."""

    key: str
    unit: str
    lower: bool


@dataclass(frozen=True, slots=True)
class Work:
    """``kind`` is a word of load.c, or ``http`` (nginx answers) or ``http_level`` (load.c does); ``number`` is its size
    or its connections."""

    name: str
    title: str
    kind: str
    number: int
    metrics: tuple[Metric, ...]


_TIMES = (Metric("p50_us", "us", True), Metric("p99_us", "us", True))
_STREAM = (Metric("gbit_s", "Gbit/s", False),)
_HTTP = (Metric("per_s", "requests/s", False), Metric("p50_us", "us", True), Metric("cpu_us", "CPU us/request", True))
WORKS: Final = (
    Work("rtt_1", "1 B round trip", "rtt", 1, _TIMES),
    Work("rtt_1k", "1 KB round trip", "rtt", 1024, _TIMES),
    Work("stream_1k", "stream of 1 KB writes", "stream", 1024, _STREAM),
    Work("stream_16k", "stream of 16 KB writes", "stream", 16 * 1024, _STREAM),
    Work("stream_128k", "stream of 128 KB writes", "stream", 128 * 1024, _STREAM),
    Work(
        "connect",
        "new connections, 16 at a time",
        "connect",
        16,
        (Metric("per_s", "connections/s", False), Metric("connect_p50_us", "us", True)),
    ),
    Work("connect_1", "new connections, one by one", "connect", 1, (Metric("connect_p50_us", "us", True),)),
    Work("http_1", "HTTP, 1 connection", "http", 1, _HTTP),
    Work("http_32", "HTTP, 32 connections", "http", 32, _HTTP),
    Work("http_32_level", "HTTP, 32 connections, level-triggered server", "http_level", 32, _HTTP),
    Work("http_256", "HTTP, 256 connections", "http", 256, _HTTP),
)
MEMORY: Final = "memory"
"""Not a work: what ztunnel's processes hold, idle and with 1,000 idle connections."""
QUICK_WORKS: Final = ("rtt_1", "stream_16k", "connect", "http_32")


@dataclass(frozen=True, slots=True)
class Selection:
    paths: tuple[Path, ...]
    works: tuple[Work, ...]
    memory: bool


def select(only: Iterable[str], quick: bool = False) -> Selection:
    """What ``--only`` leaves: names of paths, of works, or ``memory``; the bases of the paths come along."""
    names = set(only)
    known = {p.name for p in PATHS} | {w.name for w in WORKS} | {MEMORY}
    if unknown := sorted(names - known):
        raise Misuse("--only", unknown[0], f"is none of {', '.join(sorted(known))}")
    paths = [p for p in PATHS if p.name in names] or list(PATHS)
    bases = {p.base for p in paths}
    chosen = tuple(p for p in PATHS if p in paths or p.name in bases)
    default = [] if names == {MEMORY} else [w for w in WORKS if not quick or w.name in QUICK_WORKS]
    works = tuple(w for w in WORKS if w.name in names) or tuple(default)
    memory = MEMORY in names or not any(w.name in names for w in WORKS)
    return Selection(chosen, works, memory and any(p.mesh for p in chosen))


def order(selection: Selection, rounds: int) -> list[tuple[int, Work, Path]]:
    """Every measurement in the order it is made."""
    found: list[tuple[int, Work, Path]] = []
    for number in range(rounds):
        paths = selection.paths if number % 2 == 0 else selection.paths[::-1]
        found += [(number, work, path) for work in selection.works for path in paths]
    return found
