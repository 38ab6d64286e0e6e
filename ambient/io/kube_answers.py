"""Answers of the Kubernetes API as values: pages of lists, lines of watches, and refusals.

One object that does not decode never hides the others: it is reported with its key.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

import msgspec

from ambient.errors import ConfigFault, PeerFault, PlatformFault
from ambient.manifest.kinds import Kind
from ambient.manifest.objects import Object, Slim
from ambient.manifest.problems import Problem, problem_of, reference

T = TypeVar("T", bound=Object)
_Shell = TypeVar("_Shell")

NESTING_MAX: Final = 10_000
"""What a Kubernetes API server takes."""


class ApiStatus(PeerFault):
    """The API server refused. ``code`` is the HTTP status, ``reason`` Kubernetes' word for it."""

    def __init__(self, code: int, reason: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{code} {reason}: {message}"[:1000])
        self.code = code if code else {"Expired": 410, "Gone": 410}.get(reason, 0)
        self.reason = reason
        self.retry_after_s = retry_after_s


class ApiUnreachable(PlatformFault):
    """No answer from the API server: refused, reset, timed out, or not readable."""


class _ListMeta(Slim, frozen=True):
    resource_version: str = ""
    continue_: str = msgspec.field(default="", name="continue")


class _Page(msgspec.Struct, Generic[T]):
    metadata: _ListMeta = _ListMeta()
    items: list[T] | None = None


class _RawPage(msgspec.Struct):
    metadata: _ListMeta = _ListMeta()
    items: list[msgspec.Raw] | None = None


class _WatchLine(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Key(Slim, frozen=True):
    namespace: str = ""
    name: str = ""
    resource_version: str = ""


class _OnlyKey(msgspec.Struct):
    """What is looked at of an object that does not decode: anything else in its metadata may be why."""

    metadata: _Key = _Key()


class Refusal(Slim, frozen=True):
    """What a Status says."""

    code: int = 0
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Listing(Generic[T]):
    """A list and the version to watch from. ``unreadable`` says of keys that exist why they did not decode."""

    items: tuple[T, ...]
    resource_version: str
    unreadable: Mapping[str, Problem] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WatchEvent(Generic[T]):
    """``type`` is ADDED, MODIFIED, DELETED or BOOKMARK; ``object`` is None for a bookmark or with a ``problem``."""

    type: str
    resource_version: str
    key: str = ""
    object: T | None = None
    problem: Problem | None = None


def _key(meta: _Key) -> str:
    return f"{meta.namespace}/{meta.name}" if meta.namespace else meta.name


def decode_page(kind: Kind[T], body: bytes) -> tuple[Listing[T], str]:
    """One page of a list and its continue token. An item that does not decode is reported, the rest stays.

    Raises ApiUnreachable for what is no list: every list has a version, and an empty answer of something that stands
    before the API server must not pass for an empty cluster.
    """
    try:
        page = msgspec.json.decode(body, type=_Page[kind.struct])  # type: ignore[name-defined]
        items = tuple(kind.bounded(item) for item in page.items or ())
        return Listing(items, _version(kind, page.metadata)), page.metadata.continue_
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ConfigFault):
        pass
    try:
        raw = _shell(body, _RawPage)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiUnreachable(f"list of {kind.plural}: not a Kubernetes list: {error}") from None
    found: list[T] = []
    unreadable: dict[str, Problem] = {}
    for item in raw.items or ():
        try:
            found.append(kind.decode(item))
        except ConfigFault as fault:
            meta = _metadata(item)
            unreadable[_key(meta)] = _problem(kind, meta, fault)
    return Listing(tuple(found), _version(kind, raw.metadata), unreadable), raw.metadata.continue_


def _version(kind: Kind[Any], meta: _ListMeta) -> str:
    if not meta.resource_version:
        raise ApiUnreachable(f"list of {kind.plural}: not a Kubernetes list: it has no resourceVersion")
    return meta.resource_version


def _shell(raw: bytes | msgspec.Raw, kind: type[_Shell]) -> _Shell:
    """What is around objects. One that is nested too deeply to be read (a status may be) must not hide all others."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except RecursionError:
        before = sys.getrecursionlimit()
        sys.setrecursionlimit(max(before, 2 * NESTING_MAX))
        try:
            return msgspec.json.decode(raw, type=kind)
        finally:
            sys.setrecursionlimit(before)


def _problem(kind: Kind[Any], meta: _Key, fault: ConfigFault) -> Problem:
    problem = problem_of(fault)
    if problem.where != kind.name:
        return problem
    return Problem(reference(kind.name, meta.namespace, meta.name or "?"), problem.field, problem.rule)


def _metadata(raw: msgspec.Raw) -> _Key:
    try:
        return _shell(raw, _OnlyKey).metadata
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _Key()


def decode_event(kind: Kind[T], line: bytes) -> WatchEvent[T]:
    """One line of a watch. Raises ApiStatus for an ERROR event, ApiUnreachable for what is no event."""
    try:
        event = _shell(line, _WatchLine)
        if event.type == "ERROR":
            status = msgspec.json.decode(event.object, type=Refusal)
            raise ApiStatus(status.code, status.reason, status.message)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiUnreachable(f"watch of {kind.plural}: not a watch event: {error}") from None
    if event.type == "BOOKMARK":
        return WatchEvent("BOOKMARK", _metadata(event.object).resource_version)
    if event.type not in ("ADDED", "MODIFIED", "DELETED"):
        raise ApiUnreachable(f"watch of {kind.plural}: unknown event type {event.type[:40]!r}")
    try:
        decoded = kind.decode(event.object)
    except ConfigFault as fault:
        meta = _metadata(event.object)
        return WatchEvent(event.type, meta.resource_version, _key(meta), None, _problem(kind, meta, fault))
    return WatchEvent(event.type, decoded.metadata.resource_version, decoded.key, decoded)
