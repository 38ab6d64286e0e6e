"""Logging of the control plane: one line per record on stderr, text for people or JSON for machines."""

from __future__ import annotations

import json
import logging
import sys
import time

_CONTROLS = {number: f"\\x{number:02x}" for number in (*range(9), *range(11, 32), *range(127, 160))}
_CONTROLS |= {10: "\\n", 13: "\\r"}


def one_line(text: str) -> str:
    """With control characters escaped: names and messages of others can neither forge a line nor drive a terminal."""
    return text.translate(_CONTROLS)


class _Text(logging.Formatter):
    """Tab separated time, level, scope, message: the form of ztunnel's log."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time(record)}\t{record.levelname.lower()}\t{record.name}\t{one_line(record.getMessage())}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "scope": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def _time(record: logging.LogRecord) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.msecs):03d}Z"


def set_up(form: str, level: str) -> None:
    """``form`` is text or json; ``level`` one of Python's names in any case (unknown: info)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.getLevelNamesMapping().get(level.upper(), logging.INFO))
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
