"""Versions: the current objects and a bounded history of what happened to them.

Every write takes the next number of one counter (the resourceVersion). The history of a kind keeps its last
events with the object before and after, so a watch is nothing but a position in it, and a list page can be
served as of the version of the first page by undoing what happened since. Who falls behind the history is
told so (410) and lists again; there are no queues per watcher to overflow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ambient.lab.apiserver.status import JsonObject, gone_version

Key = tuple[str, str]
"""Namespace (empty for cluster-scoped) and name."""

ADDED, MODIFIED, DELETED = "ADDED", "MODIFIED", "DELETED"


@dataclass(frozen=True, slots=True)
class Change:
    """One write. ``obj`` is the new object (the last one, with the deletion's version, for DELETED)."""

    version: int
    type: str
    key: Key
    obj: JsonObject
    previous: JsonObject | None


class _Log:
    """Objects and history of one kind."""

    __slots__ = ("changes", "compacted", "objects")

    def __init__(self, compacted: int) -> None:
        self.objects: dict[Key, JsonObject] = {}
        self.changes: deque[Change] = deque()
        self.compacted = compacted


class History:
    """Objects by kind and key. ``first_version`` should exceed that of an earlier run, so old clients list again."""

    def __init__(self, *, first_version: int = 1, changes_max: int = 4096) -> None:
        self._logs: dict[str, _Log] = {}
        self._first = first_version
        self._version = first_version
        self._changes_max = changes_max
        self._listeners: list[Callable[[str], None]] = []

    @property
    def version(self) -> int:
        """The number of the last write."""
        return self._version

    def next_version(self) -> int:
        """The number the next write will take; the object must carry it before `commit`."""
        return self._version + 1

    def listen(self, callback: Callable[[str], None]) -> Callable[[], None]:
        """Call ``callback(resource)`` after each write. Returns the function that ends this."""
        self._listeners.append(callback)
        return lambda: self._listeners.remove(callback)

    def _log(self, resource: str) -> _Log:
        log = self._logs.get(resource)
        if log is None:
            log = self._logs[resource] = _Log(self._first)
        return log

    def get(self, resource: str, key: Key) -> JsonObject | None:
        return self._log(resource).objects.get(key)

    def objects(self, resource: str) -> Iterator[tuple[Key, JsonObject]]:
        """In order of namespace and name."""
        objects = self._log(resource).objects
        return iter(sorted(objects.items(), key=lambda item: item[0]))

    def count(self) -> int:
        return sum(len(log.objects) for log in self._logs.values())

    def commit(self, resource: str, key: Key, obj: JsonObject, *, deleted: bool = False) -> None:
        """Write ``obj``, which carries `next_version`, and tell the listeners."""
        log = self._log(resource)
        previous = log.objects.get(key)
        self._version += 1
        if deleted:
            kind = DELETED
            log.objects.pop(key, None)
        else:
            kind = MODIFIED if previous is not None else ADDED
            log.objects[key] = obj
        log.changes.append(Change(self._version, kind, key, obj, previous))
        while len(log.changes) > self._changes_max:
            log.compacted = log.changes.popleft().version
        for callback in tuple(self._listeners):
            callback(resource)

    def since(self, resource: str, version: int, limit: int = 500) -> list[Change]:
        """At most ``limit`` changes after ``version``, oldest first. ApiError 410 when some are forgotten.

        A version this server never gave out (the future) is refused likewise: it belongs to another run.
        """
        log = self._log(resource)
        if version < log.compacted or version > self._version:
            raise gone_version(version, log.compacted)
        found: list[Change] = []
        if not log.changes or log.changes[-1].version <= version:
            return found
        # Positions are few behind in practice: walk from the new end to the first one not seen.
        start = len(log.changes)
        for change in reversed(log.changes):
            if change.version <= version:
                break
            start -= 1
        for index in range(start, min(len(log.changes), start + limit)):
            found.append(log.changes[index])
        return found

    def snapshot(self, resource: str, version: int) -> list[tuple[Key, JsonObject]]:
        """All objects as they were at ``version``, in order of key. ApiError 410 when that is forgotten."""
        log = self._log(resource)
        if version == self._version:
            return list(self.objects(resource))
        if version < log.compacted or version > self._version:
            raise gone_version(version, log.compacted)
        objects = dict(log.objects)
        for change in reversed(log.changes):
            if change.version <= version:
                break
            if change.previous is None:
                objects.pop(change.key, None)
            else:
                objects[change.key] = change.previous
        return sorted(objects.items(), key=lambda item: item[0])
