"""Lists in pages: a continue token names the version the list is of and the last object that was shown."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass

from ambient.lab.apiserver.history import Key
from ambient.lab.apiserver.status import JsonObject, expired


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a list, as of ``version``. ``next`` is the continue token, empty on the last page."""

    items: list[JsonObject]
    version: int
    next: str = ""
    remaining: int | None = None


def first_page(items: Sequence[tuple[Key, JsonObject]], version: int, limit: int, *, counted: bool) -> Page:
    """Of all that is (still) to be shown: at most ``limit`` (0: all). ``counted``: say how many remain."""
    if not limit or len(items) <= limit:
        return Page([obj for _, obj in items], version)
    kept = items[:limit]
    remaining = len(items) - limit if counted else None
    return Page([obj for _, obj in kept], version, _write_token(version, kept[-1][0]), remaining)


def _write_token(version: int, key: Key) -> str:
    return base64.urlsafe_b64encode(json.dumps({"v": version, "start": key}).encode()).decode()


def read_token(token: str) -> tuple[int, Key]:
    """Version and last object shown. Raises ApiError 410."""
    try:
        value = json.loads(base64.urlsafe_b64decode(token.encode()))
        namespace, name = value["start"]
        return int(value["v"]), (str(namespace), str(name))
    except (binascii.Error, ValueError, TypeError, KeyError):
        raise expired("continue key is not valid: start the list again without it") from None
