"""The log of ztunnel's processes on stdout: ``time<TAB>level<TAB>scope<TAB>message``, or one JSON object a line.

A reader that went away (the process that started ztunnel may have died) or stalls never ends or stops a process.
"""

from __future__ import annotations

import json
import logging
import os
import select
import stat
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
PATIENCE_S: Final = 0.1
"""How long a full pipe is waited for, once, before lines are lost."""


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
    _out.write(text.encode("utf-8", "backslashreplace"))


class _Out:
    """Stdout. Where it is a pipe, a reader that stalls loses lines and stops nobody: who writes also has connections to
    move, or Worlds and questions to attend to."""

    def __init__(self) -> None:
        self.form = "text"
        self._pid = 0
        self._fd = STDOUT
        self._stalled = False
        self._torn = b""
        """A line feed, if the last line was cut off."""
        self._lost = 0

    def _open(self) -> None:
        """A description of our own, because whether it blocks is shared with all who have the other. After a fork anew:
        children close what they do not know."""
        self._pid, self._fd = os.getpid(), STDOUT
        try:
            if stat.S_ISFIFO(os.fstat(STDOUT).st_mode):
                self._fd = os.open(f"/proc/self/fd/{STDOUT}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            pass  # nobody reads, or no /proc

    def write(self, raw: bytes) -> None:
        if self._pid != os.getpid():
            self._open()
        if self._lost:
            notice = f"{self._lost} lines were lost: nobody read them"
            record = logging.LogRecord("log", logging.WARNING, "", 0, notice, None, None)
            if self._put(self._torn + Line(self.form).format(record).encode() + b"\n"):
                self._lost += raw.count(b"\n")
                return
            self._lost = 0
        self._lost += self._put(raw).count(b"\n")

    def _put(self, raw: bytes) -> bytes:
        """What could not be written."""
        while raw:
            try:
                written = os.write(self._fd, raw)
            except BlockingIOError:
                if self._stalled or not select.select([], [self._fd], [], PATIENCE_S)[1]:
                    self._stalled = True
                    return raw
                continue
            except OSError:
                return b""
            self._stalled, self._torn = False, b"" if raw[written - 1 : written] == b"\n" else b"\n"
            raw = raw[written:]
        return b""


_out = _Out()


def install(level: str, form: str) -> None:
    """Take over the root logger of this process. ``level`` is one of `LEVELS`, ``form`` text or json."""
    handler = _Stdout()
    handler.setFormatter(Line(form))
    logging.root.handlers[:] = [handler]
    logging.raiseExceptions = False
    _out.form = form
    set_level(level)


def set_level(level: str) -> None:
    """Raises ValueError naming the level if there is none of that name."""
    number = LEVELS.get(level.lower())
    if number is None:
        raise ValueError(f"level {level!r}: one of {', '.join(LEVELS)}")
    logging.root.setLevel(number)
