"""A reflector: keeps a copy of all objects of one kind and calls back for every change.

List in pages, then watch from the list's version. Every event, bookmarks included, moves the version. When the
version is too old (410, as HTTP status or inside the stream) it lists again and reports the difference, with
what vanished as deletions; until then the old copy serves. Anything else retries from the same version after
a jittered pause. A kind whose definition is not installed (404) counts as empty and is asked for slowly.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from contextlib import aclosing
from types import MappingProxyType
from typing import Generic, TypeVar

from ambient.errors import PlatformFault
from ambient.io.kube import RETRY_AFTER_MAX_S, KubeClient, backoff_s
from ambient.io.kube_answers import ApiStatus, ApiUnreachable
from ambient.manifest.kinds import Changed, Kind
from ambient.manifest.objects import Object
from ambient.manifest.problems import Problem

T = TypeVar("T", bound=Object)
log = logging.getLogger(__name__)

WATCH_TIMEOUT_S = (300, 600)  # random, so that a fleet does not reconnect at once
STALL_TIMEOUT_S = 120.0  # bookmarks come about each minute
ABSENT_RETRY_S = 30.0
SHORT_WATCH_S = 1.0  # a watch that ends sooner, without an event, counts as a failure


class Reflector(Generic[T]):
    """Make it, run it in a task: ``await reflector.run()`` ends only by cancellation.

    ``on_event`` is called in the event loop for each `Changed`, in the order of the API server; it must not
    raise. ``on_problem`` is told of an object that does not decode (the last good form stays in the copy) and,
    with None, once it is readable again or gone.
    """

    def __init__(
        self,
        client: KubeClient,
        kind: Kind[T],
        on_event: Callable[[Changed[T]], None],
        *,
        namespace: str = "",
        field_selector: str = "",
        label_selector: str = "",
        on_problem: Callable[[str, Problem | None], None] | None = None,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        absent_retry_s: float = ABSENT_RETRY_S,
        backoff: Callable[[int], float] = backoff_s,
    ) -> None:
        self.client = client
        self.kind = kind
        self.synced = asyncio.Event()
        """Set after the first complete list (or when the kind is not installed); never cleared."""
        self.relists = 0
        self.failures = 0
        """Failed attempts since the last success."""
        self.last_error = ""
        self._on_event = on_event
        self._on_problem = on_problem or (lambda _key, _problem: None)
        self._namespace = namespace
        self._selectors = {"field_selector": field_selector, "label_selector": label_selector}
        self._stall_timeout_s = stall_timeout_s
        self._absent_retry_s = absent_retry_s
        self._backoff = backoff
        self._cache: dict[str, T] = {}
        self._unreadable: set[str] = set()
        self._version = ""
        self._expiries = 0  # 410s without an event between
        self._absences = 0

    @property
    def objects(self) -> Mapping[str, T]:
        """A read view of the copy, by `Object.key`."""
        return MappingProxyType(self._cache)

    @property
    def unreadable(self) -> frozenset[str]:
        """Keys of objects that exist and do not decode; `objects` has their last good form, if there ever was one."""
        return frozenset(self._unreadable)

    async def run(self) -> None:
        while True:
            try:
                if not self._version:
                    await self._relist()
                await self._watch()
            except ApiStatus as status:
                if status.code == 410:  # the version is too old
                    self._version = ""
                    self._expiries += 1
                    if self._expiries > 1:  # and so was the one just listed
                        await self._pause(status, None)
                elif status.code == 404 and self.kind.group:
                    await self._absent(status)
                else:
                    await self._pause(status, status.retry_after_s)
            except PlatformFault as error:  # unreachable, or no credentials
                await self._pause(error, None)

    async def _relist(self) -> None:
        listing = await self.client.list(self.kind, self._namespace, **self._selectors)
        self.relists += 1
        fresh = {item.key: item for item in listing.items}
        for key, item in fresh.items():
            self._put(key, item)
        for key, problem in listing.unreadable.items():
            self._refuse(key, problem)
        for key in [k for k in self._cache if k not in fresh and k not in listing.unreadable]:
            self._remove(key)
        for key in [k for k in self._unreadable if k not in listing.unreadable]:
            self._readable(key)
        self._version = listing.resource_version
        self._succeeded()
        self.synced.set()

    async def _watch(self) -> None:
        """Follow one watch to its end."""
        loop = asyncio.get_running_loop()
        started, events = loop.time(), 0
        watch = self.client.watch(
            self.kind,
            self._version,
            self._namespace,
            timeout_s=random.randint(*WATCH_TIMEOUT_S),
            stall_timeout_s=self._stall_timeout_s,
            **self._selectors,
        )
        async with aclosing(watch):
            async for event in watch:
                events += 1
                if event.resource_version:
                    if _earlier(event.resource_version, self._version):  # etcd was restored from a backup
                        message = f"the API server went back from version {self._version} to {event.resource_version}"
                        raise ApiStatus(410, "Expired", message)
                    self._version = event.resource_version
                self._expiries = 0
                self._succeeded()
                if event.type == "BOOKMARK":
                    continue
                if event.type == "DELETED":
                    self._remove(event.key)
                    self._readable(event.key)
                elif event.object is not None:
                    self._put(event.key, event.object)
                elif event.problem is not None:
                    self._refuse(event.key, event.problem)
        if events == 0 and loop.time() - started < SHORT_WATCH_S:
            raise ApiUnreachable(f"watch of {self.kind.plural}: ended at once")

    def _put(self, key: str, item: T) -> None:
        self._readable(key)
        old = self._cache.get(key)
        # the version alone does not tell: after a restore from a backup it may be given again
        if old is not None and old == item and item.metadata.resource_version:
            return
        if old is not None and old.metadata.uid != item.metadata.uid:
            self._remove(key)  # another object: nothing of the earlier one of its name counts any more
            old = None
        self._cache[key] = item
        self._on_event(Changed(self.kind, key, old, item))

    def _remove(self, key: str) -> None:
        old = self._cache.pop(key, None)
        if old is not None:
            self._on_event(Changed(self.kind, key, old, None))

    def _refuse(self, key: str, problem: Problem) -> None:
        log.warning("%s (its last good form, if any, stays in force)", problem)
        self._unreadable.add(key)
        self._on_problem(key, problem)

    def _readable(self, key: str) -> None:
        if key in self._unreadable:
            self._unreadable.discard(key)
            self._on_problem(key, None)

    def _succeeded(self) -> None:
        self.failures = self._absences = 0
        self.last_error = ""

    async def _absent(self, status: ApiStatus) -> None:
        """Not installed: empty, once said twice. A starting API server says so of kinds that it will know soon."""
        self._absences += 1
        self._version = ""
        self.last_error = str(status)
        if self._absences == 1:
            log.info("%s is not installed on this API server (%s); asking again slowly", self.kind.plural, status)
        else:
            for key in list(self._cache):
                self._remove(key)
        self.synced.set()
        await asyncio.sleep(self._absent_retry_s)

    async def _pause(self, error: Exception, retry_after_s: float | None) -> None:
        self.last_error = str(error)
        pause_s = self._backoff(max(self.failures, self._expiries))
        if retry_after_s is not None:
            pause_s = min(retry_after_s, RETRY_AFTER_MAX_S)
        if self.failures in (0, 4) or self.failures % 20 == 0:
            log.warning("reflector of %s: %s; trying again in %.1f s", self.kind.plural, error, pause_s)
        self.failures += 1
        await asyncio.sleep(pause_s)


def _earlier(version: str, known: str) -> bool:
    """Whether a version is certainly earlier; versions that are not numbers are not compared."""
    return version.isdecimal() and known.isdecimal() and int(version) < int(known)
