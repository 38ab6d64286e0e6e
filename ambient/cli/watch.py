"""``--watch``: the same look again and again, with what changed per second, until SIGINT or SIGTERM (exit code 0)."""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import click

from ambient.cli.output import cell, table
from ambient.errors import Misuse

_F = TypeVar("_F", bound=Callable[..., Any])
Row = Mapping[str, Any]
INTERVAL_S = 1.0


def watch_options(function: _F) -> _F:
    """``--watch``, ``--interval`` and ``--count``."""

    def wrapped(*args: Any, watch: bool, interval: float | None, count: int | None, **rest: Any) -> Any:
        for name, value in (("--interval", interval), ("--count", count)):
            if value is not None and not watch:
                raise Misuse(name, value, "says how to look again and again: give --watch too")
        return function(*args, watch=watch, interval=INTERVAL_S if interval is None else interval, count=count, **rest)

    wrapped.__doc__, wrapped.__name__ = function.__doc__, function.__name__
    wrapped.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
    seconds = click.FloatRange(0.05, 3600)
    for option in (
        click.option("--count", type=click.IntRange(1), help="With --watch: end after so many looks."),
        click.option("--interval", type=seconds, help=f"With --watch: seconds between looks.  [default: {INTERVAL_S}]"),
        click.option("-w", "--watch", is_flag=True, help="Look again every second; -o json prints one line per look."),
    ):
        option(wrapped)
    return wrapped  # type: ignore[return-value]


def ticks(interval: float, count: int | None) -> Iterator[float]:
    """Monotonic times, ``interval`` seconds apart, until ``count`` of them, SIGINT or SIGTERM."""
    wake, ring = os.pipe()
    os.set_blocking(ring, False)
    before = {number: signal.signal(number, lambda *_: _ring(ring)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        due, done = time.monotonic(), 0
        while True:
            yield time.monotonic()
            done += 1
            due += interval
            if count is not None and done >= count:
                return
            ready, _, _ = select.select((wake,), (), (), max(0.0, due - time.monotonic()))
            if ready:
                return
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(wake)
        os.close(ring)


def _ring(ring: int) -> None:
    try:
        os.write(ring, b"!")
    except BlockingIOError:
        pass


class Rates:
    """Changes per second between two looks, by name. The first look at a name has no rate (None)."""

    def __init__(self) -> None:
        self._sets: dict[Hashable, tuple[float, frozenset[Any]]] = {}
        self._numbers: dict[Hashable, tuple[float, float]] = {}

    def entries(self, name: Hashable, now: float, keys: Collection[Any]) -> tuple[float | None, float | None]:
        """Entries that came and that went, per second: one that was replaced by another counts in both."""
        found = frozenset(keys)
        before = self._sets.get(name)
        self._sets[name] = (now, found)
        if before is None or now <= before[0]:
            return None, None
        past = now - before[0]
        return round(len(found - before[1]) / past, 1), round(len(before[1] - found) / past, 1)

    def number(self, name: Hashable, now: float, value: float) -> float | None:
        """Growth per second of a number that only grows; one that fell began again at nothing."""
        before = self._numbers.get(name)
        self._numbers[name] = (now, value)
        if before is None or now <= before[0]:
            return None
        grown = value - before[1] if value >= before[1] else value
        return round(grown / (now - before[0]), 1)


def show(rows: Sequence[Row], output: str, columns: Collection[str], changes: Row | None = None) -> None:
    """One look: a time and a table for people, one line of JSON for programs. ``changes`` are rates of the whole."""
    if output == "yaml":
        raise Misuse("-o", output, "--watch prints a table or, with -o json, one line per look")
    if output == "json":
        click.echo(
            json.dumps(
                {"at": round(time.time(), 3), **(changes or {}), "rows": [dict(row) for row in rows]}, default=str
            )
        )
    else:
        known = {name: rate for name, rate in (changes or {}).items() if rate is not None}
        said = ", ".join(f"{name.removesuffix('_per_s')} {rate}/s" for name, rate in known.items())
        click.echo(time.strftime("%H:%M:%S") + (f"  {said}" if said else ""))
        click.echo(table(rows, list(columns)) if rows else cell(None))
        click.echo("")
