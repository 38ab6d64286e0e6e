"""The log of ztunnel's processes on stdout: ``time<TAB>level<TAB>scope<TAB>message``, or one JSON object a line.

A reader that went away (the process that started ztunnel may have died) never ends a process.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from ambient.io.logs import one_line

LEVELS: Final = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "off": logging.CRITICAL + 1,
}
_NAMES = {logging.DEBUG: "debug", logging.INFO: "info", logging.WARNING: "warn", logging.ERROR: "error"}
STDOUT: Final = 1


def timestamp(at: float) -> str:
    """RFC 3339 in UTC with microseconds; ``at`` in seconds since the epoch."""
    whole, micro = divmod(round(at * 1_000_000), 1_000_000)
    return f"{_second(whole)}.{micro:06d}Z"


@lru_cache(maxsize=64)
def _second(whole: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole))


def level_name(level: int) -> str:
    return _NAMES.get(level, "error" if level > logging.ERROR else "debug")


class Line(logging.Formatter):
    """``form`` is text or json."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self._json = form == "json"

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        level = level_name(record.levelno)
        if self._json:
            return json.dumps(
                {"level": level, "time": timestamp(record.created), "scope": record.name, "message": message}
            )
        return f"{timestamp(record.created)}\t{level}\t{record.name}\t{one_line(message)}"


class _Stdout(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            write_lines([self.format(record)])
        except Exception:  # a record that cannot be formatted must not end what it reports on
            write_lines([f"{timestamp(record.created)}\terror\tlog\tunprintable record of {record.name}"])


def write_lines(lines: Iterable[str]) -> None:
    """Write whole lines to stdout; dropped if nobody can read them."""
    write("".join(f"{line}\n" for line in lines))


def write(text: str) -> None:
    """The same with a line feed at the end of each."""
    raw = text.encode("utf-8", "backslashreplace")
    while raw:
        try:
            raw = raw[os.write(STDOUT, raw) :]
        except OSError:
            return


def install(level: str, form: str) -> None:
    """Take over the root logger of this process. ``level`` is one of `LEVELS`, ``form`` text or json."""
    handler = _Stdout()
    handler.setFormatter(Line(form))
    logging.root.handlers[:] = [handler]
    logging.raiseExceptions = False
    set_level(level)


def set_level(level: str) -> None:
    """Raises ValueError naming the level if there is none of that name."""
    number = LEVELS.get(level.lower())
    if number is None:
        raise ValueError(f"level {level!r}: one of {', '.join(LEVELS)}")
    logging.root.setLevel(number)
