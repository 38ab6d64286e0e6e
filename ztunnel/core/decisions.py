"""The decisions a worker was given and keeps: routes by destination, verdicts with who relies on them.

Pure bookkeeping. A question is asked once however many wait for it; an answer is kept until it is replaced or
evicted; a verdict that is relied on is never evicted, because its revocation would then reach nobody. An older
generation never replaces a newer one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container
from typing import Final, Generic, Protocol, TypeVar

from ztunnel.core.floods import Shares
from ztunnel.core.messages import AskRoute, AskVerdict, Route, Verdict

KEPT_MAX: Final = 16384
"""Routes, and verdicts: those of each source address count. Of eight workers that is what the control process keeps."""
NOT_SYNCED: Final = "not_synced"
"""The reason of an answer that knows nothing: it serves who waits, is not kept, and replaces nothing. A control
process that was restarted while the control plane is away must not undo what its predecessor decided."""
WAITING_MAX: Final = 8192
WAITING_OF_POD: Final = 2048
"""Connections that wait for answers about one pod: while the control process is away, or where a pod gets no
certificate, they wait for seconds, and one pod's must not have those of others refused."""
SOURCES_MAX: Final = 1024
"""Source addresses of which one verdict is kept; an IPv6 client has more addresses than any memory."""

_SEARCHED: Final = 64

A = TypeVar("A")


class Holder(Protocol):
    """A connection that relies on a verdict."""

    done: bool
    """It is over."""

    def lost_right(self, verdict: Verdict) -> None:
        """The verdict says no now: close."""


class Waiting(Generic[A]):
    """Questions that are open, with their deadline and everybody who asked. The first part of a key is whose they are:
    a pod, or its identity."""

    def __init__(self) -> None:
        self._open: dict[tuple[object, ...], tuple[float, list[Callable[[A | None], None]]]] = {}
        self._shares = Shares(WAITING_MAX, WAITING_OF_POD)
        self._count = 0

    def join(self, key: tuple[object, ...], deadline: float, callback: Callable[[A | None], None]) -> bool:
        """Whether the question is new and has to be asked. Beyond a limit the callback gets None at once."""
        if not self._shares.enter(str(key[0])):
            callback(None)
            return False
        self._count += 1
        known = self._open.get(key)
        if known is not None:
            known[1].append(callback)
            return False
        self._open[key] = (deadline, [callback])
        return True

    def answer(self, key: tuple[object, ...], answer: A | None) -> None:
        """Tell everybody who waits for this key."""
        known = self._open.pop(key, None)
        if known is not None:
            self._count -= len(known[1])
            for _ in known[1]:
                self._shares.leave(str(key[0]))
            for callback in known[1]:
                callback(answer)

    def __contains__(self, key: object) -> bool:
        return key in self._open

    def keys(self) -> list[tuple[object, ...]]:
        return list(self._open)

    def expire(self, now: float) -> None:
        """Answer None to whoever waited for too long."""
        for key in [key for key, (deadline, _) in self._open.items() if deadline <= now]:
            self.answer(key, None)

    def __len__(self) -> int:
        return self._count


class Decision:
    """A verdict as it stands, and the connections that rely on it."""

    __slots__ = ("asked_ip", "generation", "holders", "verdict")

    def __init__(self, verdict: Verdict, asked_ip: str) -> None:
        self.verdict = verdict
        self.generation = verdict.generation
        self.asked_ip = asked_ip
        """A source address to ask again with."""
        self.holders: dict[Holder, str] = {}
        """Connection -> its source address."""


VerdictKey = tuple[str, str, int, str]
"""Destination (pod UID), its address, port, identity."""


class Decisions:
    """Routes and verdicts. ``forget`` is told of evicted keys."""

    def __init__(self, kept_max: int = KEPT_MAX) -> None:
        self._kept_max = kept_max
        self._routes: dict[tuple[str, str, int], Route] = {}
        self._verdicts: dict[VerdictKey, dict[str, Decision]] = {}
        self._count = 0
        """Of verdicts, over all keys and source addresses."""
        self.forgotten_routes: list[tuple[str, str, int]] = []
        self.forgotten_verdicts: list[tuple[str, str, int, str, str]] = []

    # --- routes --------------------------------------------------------------------------------------------

    def route(self, key: tuple[str, str, int]) -> Route | None:
        return self._routes.get(key)

    def put_route(self, route: Route) -> Route:
        """Keep it, and return what holds now."""
        key = (route.source, route.ip, route.port)
        known = self._routes.get(key)
        if route.reason == NOT_SYNCED:
            return known or route
        if known is not None and known.generation > route.generation:
            return known
        if known is None and len(self._routes) >= self._kept_max:
            oldest = next(iter(self._routes))
            del self._routes[oldest]
            self.forgotten_routes.append(oldest)
        self._routes[key] = route
        return route

    def take_forgotten(
        self, open_routes: Container[object], open_verdicts: Container[object]
    ) -> tuple[tuple[tuple[str, str, int], ...], tuple[tuple[str, str, int, str, str], ...]]:
        """What was evicted and may be forgotten on the other side as well; the lists are empty then.

        A key that is kept again, or asked for again, is not among them: to forget it would leave us with an answer
        that nobody changes any more.
        """
        routes = tuple(key for key in self.forgotten_routes if key not in self._routes and key not in open_routes)
        verdicts = tuple(
            key
            for key in self.forgotten_verdicts
            if key[4] not in self._verdicts.get(key[:4], {}) and key not in open_verdicts
        )
        self.forgotten_routes.clear()
        self.forgotten_verdicts.clear()
        return routes, verdicts

    def keeps(self, answer: Route | Verdict) -> bool:
        """Whether an answer is about something kept here. Another one that nobody asked for was under way when its
        key was evicted: kept, it would be an answer that the other side has forgotten and never changes."""
        if isinstance(answer, Route):
            return (answer.source, answer.ip, answer.port) in self._routes
        entry = self._verdicts.get((answer.destination, answer.destination_ip, answer.port, answer.identity))
        return entry is not None and (not answer.source_ip or answer.source_ip in entry or "" in entry)

    # --- verdicts ------------------------------------------------------------------------------------------

    def verdict(self, key: VerdictKey, source_ip: str) -> Decision | None:
        entry = self._verdicts.get(key)
        if entry is None:
            return None
        return entry.get("") or entry.get(source_ip)

    def put_verdict(self, verdict: Verdict, asked_ip: str = "") -> tuple[Decision, list[tuple[Holder, str]]]:
        """Keep it. Returns the decision that holds now and the connections, with their source addresses, whose
        verdict is not known any more (it used not to depend on the address and now does): ask for each."""
        key = (verdict.destination, verdict.destination_ip, verdict.port, verdict.identity)
        if verdict.reason == NOT_SYNCED:
            return self.verdict(key, verdict.source_ip or asked_ip) or Decision(verdict, asked_ip), []
        known = self._verdicts.get(key, {}).get(verdict.source_ip)
        if known is not None:
            if known.generation > verdict.generation:
                return known, []
            known.verdict = verdict
            known.generation = verdict.generation
            self._revoke(known)
            return known, []
        if self._count >= self._kept_max:
            self._evict_verdicts()
        entry = self._verdicts.setdefault(key, {})
        decision = Decision(verdict, verdict.source_ip or asked_ip)
        orphans: list[tuple[Holder, str]] = []
        if not verdict.source_ip:  # it does not depend on the address any more
            for old in entry.values():
                decision.holders.update(old.holders)
            self._count -= len(entry)
            entry.clear()
        elif (general := entry.pop("", None)) is not None:
            self._count -= 1
            for holder, source_ip in general.holders.items():
                if source_ip == verdict.source_ip:
                    decision.holders[holder] = source_ip
                else:
                    orphans.append((holder, source_ip))
        if len(entry) >= SOURCES_MAX:
            self._evict_sources(key, entry, _SEARCHED, SOURCES_MAX - 1)
        entry[verdict.source_ip] = decision
        self._count += 1
        self._revoke(decision)
        return decision, orphans

    @staticmethod
    def _revoke(decision: Decision) -> None:
        if not decision.verdict.allow:
            holders = list(decision.holders)
            decision.holders.clear()
            for holder in holders:
                holder.lost_right(decision.verdict)

    def hold(self, key: VerdictKey, source_ip: str, holder: Holder) -> bool:
        """``holder`` relies on the verdict from now on, until `release`. False if there is none that allows it."""
        decision = self.verdict(key, source_ip)
        if decision is None or not decision.verdict.allow:
            return False
        decision.holders[holder] = source_ip
        return True

    def release(self, key: VerdictKey, source_ip: str, holder: Holder) -> None:
        decision = self.verdict(key, source_ip)
        if decision is not None:
            decision.holders.pop(holder, None)

    def _evict_verdicts(self) -> None:
        """Drop the oldest verdicts nobody relies on until there is room, among the first few. Those that are relied on
        go to the end, for the next search: connections that stay open must not make the rest immortal."""
        left = _SEARCHED
        for key in list(itertools.islice(self._verdicts, _SEARCHED)):
            entry = self._verdicts.pop(key)
            left -= self._evict_sources(key, entry, left, 0)
            if entry:
                self._verdicts[key] = entry
            if self._count < self._kept_max or left <= 0:
                return

    def _evict_sources(self, key: VerdictKey, entry: dict[str, Decision], search: int, leave: int) -> int:
        """The same among the source addresses of one verdict, of which so many may stay. How many were looked at."""
        looked = 0
        for source_ip in list(itertools.islice(entry, search)):
            if len(entry) <= leave:
                break
            looked += 1
            decision = entry.pop(source_ip)
            if decision.holders:
                entry[source_ip] = decision
                continue
            self._count -= 1
            self.forgotten_verdicts.append((*key, source_ip))
        return looked

    # --- both ----------------------------------------------------------------------------------------------

    def start_again(self) -> list[AskRoute | AskVerdict]:
        """Any answer may replace what is kept now, whatever its generation, and all of it is asked again: the
        control process is another one, or verdicts came to depend on the source address. Verdicts are asked for
        each source address that relies on them."""
        questions: list[AskRoute | AskVerdict] = []
        for key, route in self._routes.items():
            self._routes[key] = _renumbered(route)
            questions.append(AskRoute(source=key[0], ip=key[1], port=key[2]))
        for verdict_key, entry in self._verdicts.items():
            for decision in entry.values():
                decision.generation = -1
                destination, destination_ip, port, identity = verdict_key
                questions.extend(
                    AskVerdict(
                        destination=destination,
                        destination_ip=destination_ip,
                        port=port,
                        identity=identity,
                        source_ip=source_ip,
                    )
                    for source_ip in sorted(set(decision.holders.values()) or {decision.asked_ip})
                )
        return questions

    def forget_pod(self, uid: str) -> None:
        """A pod of this node is gone: drop what concerns it."""
        for route_key in [key for key in self._routes if key[0] == uid]:
            del self._routes[route_key]
            self.forgotten_routes.append(route_key)
        for key in [key for key in self._verdicts if key[0] == uid]:
            entry = self._verdicts.pop(key)
            self._count -= len(entry)
            self.forgotten_verdicts.extend((*key, source_ip) for source_ip in entry)


def _renumbered(route: Route) -> Route:
    return Route(
        source=route.source,
        ip=route.ip,
        port=route.port,
        generation=-1,
        kind=route.kind,
        hops=route.hops,
        service=route.service,
        identity=route.identity,
        baggage=route.baggage,
        reason=route.reason,
        message=route.message,
    )
