"""A watch: the history read from a position on, as lines of JSON.

`Cursor` is the pure part. `serve` waits for writes and hands lines to the connection; a client that does not
read within the write timeout is dropped, and one that fell behind the history is told to list again (410).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

import msgspec

from ambient.lab.apiserver.history import ADDED, DELETED, MODIFIED, Change, History
from ambient.lab.apiserver.schema import Kind
from ambient.lab.apiserver.selectors import Matcher
from ambient.lab.apiserver.status import ApiError, JsonObject

INITIAL_EVENTS_END = "k8s.io/initial-events-end"
_WRITE_BYTES = 64 * 1024
"""Events are gathered up to this; TLS transports hold back a writer only between writes, never within one."""
Shape = Callable[[JsonObject, bool], JsonObject]
"""Makes the document sent for an object; the flag says whether it is the first of this watch (table headers)."""


@dataclass(frozen=True, slots=True)
class WatchOptions:
    """``version`` None: begin with all present objects. Times in seconds."""

    namespace: str = ""
    matches: Matcher | None = None
    version: int | None = None
    bookmarks: bool = False
    initial_events: bool = False
    timeout_s: float = 1800.0
    bookmark_interval_s: float = 60.0
    write_timeout_s: float = 30.0


def seen_as(change: Change, namespace: str, matches: Matcher | None) -> tuple[str, JsonObject] | None:
    """What a change is to a watcher that sees only its namespace and selection: entering it is being added."""
    if namespace and change.key[0] != namespace:
        return None
    if matches is None:
        return change.type, change.obj
    before = change.previous is not None and matches(change.previous)
    after = change.type != DELETED and matches(change.obj)
    if before and after:
        return MODIFIED, change.obj
    if after:
        return ADDED, change.obj
    return (DELETED, change.obj) if before else None


class Cursor:
    """A position in the history of one kind."""

    def __init__(self, history: History, kind: Kind, options: WatchOptions) -> None:
        self._history = history
        self._kind = kind
        self._options = options
        self.version = history.version if options.version is None else options.version

    def initial(self) -> list[JsonObject]:
        """The present objects, for a watch that asked for no version."""
        options = self._options
        return [
            obj
            for key, obj in self._history.objects(self._kind.resource)
            if (not options.namespace or key[0] == options.namespace)
            and (options.matches is None or options.matches(obj))
        ]

    def advance(self) -> tuple[list[tuple[str, JsonObject]], bool]:
        """Events since the last call and whether the end was reached. Raises ApiError 410 when behind the history."""
        changes = self._history.since(self._kind.resource, self.version)
        events = [seen_as(change, self._options.namespace, self._options.matches) for change in changes]
        if changes:
            self.version = changes[-1].version
        else:
            self.version = max(self.version, self._history.version)
        return [event for event in events if event is not None], not changes


async def serve(
    history: History,
    kind: Kind,
    options: WatchOptions,
    shape: Shape,
    write: Callable[[bytes], Awaitable[None]],
    api_version: str,
) -> None:
    """Write events until the timeout, cancellation, or the client is lost (TimeoutError, ConnectionError)."""
    loop = asyncio.get_running_loop()
    wake = asyncio.Event()
    end_listening = history.listen(lambda resource: wake.set() if resource == kind.resource else None)
    first = True

    async def put(data: bytes) -> None:
        async with asyncio.timeout(options.write_timeout_s):
            await write(data)

    async def send(events: Iterable[tuple[str, JsonObject]]) -> None:
        nonlocal first
        batch = bytearray()
        for name, obj in events:
            batch += msgspec.json.encode({"type": name, "object": shape(obj, first)}) + b"\n"
            first = False
            if len(batch) >= _WRITE_BYTES:
                await put(bytes(batch))
                batch.clear()
        if batch:
            await put(bytes(batch))

    async def bookmark(version: int, annotations: JsonObject | None = None) -> None:
        metadata: JsonObject = {"resourceVersion": str(version), "creationTimestamp": None}
        if annotations:
            metadata["annotations"] = annotations
        document = {"kind": kind.kind, "apiVersion": api_version, "metadata": metadata}
        await put(msgspec.json.encode({"type": "BOOKMARK", "object": document}) + b"\n")

    try:
        cursor = Cursor(history, kind, options)
        if options.version is None or options.initial_events:
            start = cursor.version = history.version
            await send([(ADDED, obj) for obj in cursor.initial()])
            if options.initial_events and options.bookmarks:
                await bookmark(start, {INITIAL_EVENTS_END: "true"})
        deadline = loop.time() + options.timeout_s
        next_bookmark = loop.time() + options.bookmark_interval_s
        while True:
            wake.clear()
            events, at_end = cursor.advance()
            await send(events)
            if not at_end:
                continue
            now = loop.time()
            if options.bookmarks and (now >= next_bookmark or now >= deadline):
                await bookmark(cursor.version)
                next_bookmark = loop.time() + options.bookmark_interval_s
            if now >= deadline:
                return
            until = min(deadline, next_bookmark) if options.bookmarks else deadline
            try:
                async with asyncio.timeout_at(until):
                    await wake.wait()
            except TimeoutError:
                pass
    except ApiError as error:
        await put(msgspec.json.encode({"type": "ERROR", "object": error.document()}) + b"\n")
    finally:
        end_listening()
