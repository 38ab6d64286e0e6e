"""Accounts of connections, and the batches of events and counters that go to the control process."""

from __future__ import annotations

import time
from collections.abc import Callable

from ztunnel.core.messages import ConnectionEvent, Events

BATCH_MAX = 256


class Account:
    """One connection's facts and bytes: ``sent`` to and ``received`` from the destination."""

    __slots__ = (
        "destination",
        "destination_address",
        "destination_identity",
        "hbone_address",
        "local",
        "number",
        "opened_at",
        "original",
        "protocol",
        "received",
        "reported_received",
        "reported_sent",
        "reporter",
        "sent",
        "service",
        "source_address",
        "source_identity",
    )

    def __init__(self, reporter: str, local: str, source_address: str, destination_address: str, now: float) -> None:
        self.number = 0
        self.reporter = reporter
        self.local = local
        self.source_address = source_address
        self.destination_address = destination_address
        self.hbone_address = ""
        self.original = ""
        self.service = ""
        self.destination = ""
        self.source_identity = ""
        self.destination_identity = ""
        self.protocol = ""
        self.sent = 0
        self.received = 0
        self.reported_sent = 0
        self.reported_received = 0
        self.opened_at = now


class Ledger:
    """The open accounts of a worker. ``send`` is given batches; ``soon`` asks to be flushed shortly."""

    def __init__(self, send: Callable[[Events], None], soon: Callable[[], None]) -> None:
        self._send = send
        self._soon = soon
        self._next = 1
        self._events: list[ConnectionEvent] = []
        self._open: dict[int, Account] = {}
        self._untold: dict[int, Account] = {}
        """Open, and nobody was told yet. What ends within the second is told once: that it ended, hence was opened."""
        self.tell_openings = False
        """At once: each is to be a line of the access log."""
        self.counters: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._open)

    def count(self, name: str, by: int = 1) -> None:
        self.counters[name] = self.counters.get(name, 0) + by

    def opened(self, account: Account) -> None:
        account.number = self._next
        self._next += 1
        self._open[account.number] = account
        if self.tell_openings:
            self._put(account, "opened")
            return
        self._untold[account.number] = account
        if len(self._untold) >= BATCH_MAX:
            self._tell()

    def _tell(self) -> None:
        untold, self._untold = self._untold, {}
        for account in untold.values():
            self._put(account, "opened", moved=False)

    def closed(
        self,
        account: Account,
        now: float,
        *,
        event: str = "closed",
        flags: str = "-",
        error: str = "",
        policy: str = "",
    ) -> None:
        """The end of a connection; one that never opened gets its number here."""
        if account.number:
            self._open.pop(account.number, None)
            if self._untold.pop(account.number, None) is not None and event != "closed":
                self._put(account, "opened", moved=False)
        else:
            account.number = self._next
            self._next += 1
        self._put(account, event, flags, error, policy, (now - account.opened_at) * 1000.0)
        self._soon()

    def tick(self, now: float) -> None:
        """Once a second: what is new, progress of what moved, then everything goes out."""
        self._tell()
        for account in self._open.values():
            if account.sent != account.reported_sent or account.received != account.reported_received:
                self._put(account, "progress", duration_ms=(now - account.opened_at) * 1000.0)
        self.flush()

    def flush(self) -> None:
        if self._events or self.counters:
            events, self._events = tuple(self._events), []
            counters, self.counters = self.counters, {}
            self._send(Events(events=events, counters=counters))

    def rows(self, now: float) -> tuple[ConnectionEvent, ...]:
        """What is open, with totals instead of deltas."""
        return tuple(
            _event(account, "open", account.sent, account.received, "-", "", "", (now - account.opened_at) * 1000.0)
            for account in self._open.values()
        )

    def _put(
        self,
        account: Account,
        event: str,
        flags: str = "-",
        error: str = "",
        policy: str = "",
        duration_ms: float = 0.0,
        *,
        moved: bool = True,
    ) -> None:
        sent = received = 0
        if moved:
            sent = account.sent - account.reported_sent
            received = account.received - account.reported_received
            account.reported_sent = account.sent
            account.reported_received = account.received
        self._events.append(_event(account, event, sent, received, flags, error, policy, duration_ms))
        if len(self._events) >= BATCH_MAX:
            self.flush()


def _event(
    account: Account, event: str, sent: int, received: int, flags: str, error: str, policy: str, duration_ms: float
) -> ConnectionEvent:
    return ConnectionEvent(
        connection=account.number,
        event=event,
        reporter=account.reporter,
        local=account.local,
        source_address=account.source_address,
        destination_address=account.destination_address,
        hbone_address=account.hbone_address,
        original=account.original,
        service=account.service,
        destination=account.destination,
        source_identity=account.source_identity,
        destination_identity=account.destination_identity,
        protocol=account.protocol,
        sent=sent,
        received=received,
        duration_ms=duration_ms,
        flags=flags,
        policy=policy,
        error=error,
        at=time.time(),
    )
