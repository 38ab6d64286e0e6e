"""When to fetch which certificate: a pure schedule, with time and random numbers as arguments.

Certificates are renewed at half their life, a little earlier by chance so that a node's do not all come due
together. A failed fetch is tried again after 1 s, doubling to 150 s, give or take a fifth; what is still valid stays in
use meanwhile. At most eight fetches run at once, and those that a connection waits for go first.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

CONCURRENT_MAX: Final = 8
BACKOFF_FIRST_S: Final = 1.0
BACKOFF_MAX_S: Final = 150.0
BACKOFF_JITTER: Final = 0.2
EARLY_MAX: Final = 0.1
"""Renewal comes up to this part of the half life early."""
RENEW_MIN_S: Final = 5.0
"""No successful fetch is repeated sooner, whatever lifetime the CA gave."""


class Priority(enum.IntEnum):
    """Lower goes first."""

    REALTIME = 0
    """A connection waits for it."""
    WARMUP = 1
    """A local pod may need it soon."""
    BACKGROUND = 2
    """A renewal."""


@dataclass(slots=True)
class _Entry:
    priority: Priority
    due: float
    failures: int = 0
    fetching: bool = False
    order: int = 0


class Renewals:
    """Identities wanted on this node and when each is due; seconds are of one clock, the wall clock."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._order = 0

    def __contains__(self, identity: str) -> bool:
        return identity in self._entries

    def want(self, identity: str, priority: Priority, now: float) -> None:
        """A certificate is wanted; asking again only raises its priority while it was never fetched."""
        entry = self._entries.get(identity)
        if entry is None:
            self._order += 1
            self._entries[identity] = _Entry(priority, now, order=self._order)
        elif entry.priority is not Priority.BACKGROUND:
            entry.priority = min(entry.priority, priority)

    def drop(self, identity: str) -> None:
        """Forgotten: the last local workload of the identity is gone."""
        self._entries.pop(identity, None)

    def start(self, now: float) -> list[str]:
        """The identities to fetch now, most urgent first; they count as running until reported."""
        running = sum(e.fetching for e in self._entries.values())
        due = sorted(
            (e.priority, e.due, e.order, identity)
            for identity, e in self._entries.items()
            if not e.fetching and e.due <= now
        )
        chosen = [identity for *_, identity in due[: max(0, CONCURRENT_MAX - running)]]
        for identity in chosen:
            self._entries[identity].fetching = True
        return chosen

    def succeeded(self, identity: str, not_before: float, not_after: float, now: float, random: float) -> None:
        """``random`` is in [0, 1)."""
        entry = self._entries.get(identity)
        if entry is None:
            return
        half = max(0.0, not_after - not_before) / 2
        entry.fetching = False
        entry.failures = 0
        entry.priority = Priority.BACKGROUND
        entry.due = max(now + RENEW_MIN_S, not_before + half * (1 - EARLY_MAX * random))

    def failed(self, identity: str, now: float, random: float) -> float:
        """The delay in seconds until it is tried again."""
        entry = self._entries.get(identity)
        if entry is None:
            return 0.0
        entry.fetching = False
        entry.failures += 1
        delay = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(entry.failures - 1, 30))
        delay *= 1 + BACKOFF_JITTER * (2 * random - 1)
        entry.due = now + delay
        return delay

    def retry_failed(self, now: float) -> None:
        """The control plane is back: what failed is due at once."""
        for entry in self._entries.values():
            if entry.failures:
                entry.failures = 0
                entry.due = min(entry.due, now)

    def failing(self, identity: str) -> bool:
        entry = self._entries.get(identity)
        return entry is not None and entry.failures > 0

    def next_due(self) -> float | None:
        """When `start` has something to do next, if nothing else happens; None: never."""
        return min((e.due for e in self._entries.values() if not e.fetching), default=None)
