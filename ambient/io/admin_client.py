"""Ask the admin endpoints of a node's processes, over their unix sockets."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

from ambient.errors import PlatformFault

TIMEOUT_S = 10.0


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._timeout_s = timeout_s
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self._timeout_s)
        self.sock.connect(str(self._path))


def ask(path: Path, target: str, method: str = "GET", timeout_s: float = TIMEOUT_S) -> str:
    """The text of an answer with status 200. PlatformFault names the socket and what to look at otherwise."""
    connection = _UnixConnection(path, timeout_s)
    try:
        connection.request(method, target)
        response = connection.getresponse()
        body = response.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        raise PlatformFault(f"{path}: {_in_words(error, timeout_s)}") from None
    finally:
        connection.close()
    if response.status != 200:
        raise PlatformFault(f"{path}: {method} {target}: {response.status} {body.strip()[:500]}")
    return body


def _in_words(error: Exception, timeout_s: float) -> str:
    """What went wrong, and what to do."""
    if isinstance(error, PermissionError):
        return "permission denied: run as root"
    if isinstance(error, FileNotFoundError | ConnectionRefusedError):
        return "nobody listens: is the node running? (its log; in a lab, `ambient lab status`)"
    if isinstance(error, TimeoutError):
        return f"no answer in {timeout_s:g} s: the process is stopped or busy, look at its log"
    return f"{error}: is the node running?"


def ask_json(path: Path, target: str, timeout_s: float = TIMEOUT_S) -> Any:
    """The same, parsed."""
    try:
        return json.loads(ask(path, target, timeout_s=timeout_s))
    except ValueError as error:
        raise PlatformFault(f"{path}: GET {target}: not JSON: {error}") from None
