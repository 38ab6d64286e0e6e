"""Lines of the logs are ours alone, whatever is in the names and messages they repeat."""

from __future__ import annotations

import logging

import pytest

from ambient.io import logs
from ztunnel.io.logs import Line

FORGED = "pod \x1b[2Jx\r\n2026-01-01T00:00:00Z\tinfo\taccess\tall is well\x9b"


@pytest.mark.parametrize("formatter", [Line("text"), Line("json"), logs._Text(), logs._Json()])
def test_a_message_is_one_line_without_control_characters(formatter: logging.Formatter):
    record = logging.LogRecord("scope", logging.INFO, "", 0, "refused: %s", (FORGED,), None)
    line = formatter.format(record)
    assert "all is well" in line and "\n" not in line and "\r" not in line and "\x1b" not in line
