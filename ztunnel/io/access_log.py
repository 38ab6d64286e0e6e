"""The access log: one line per connection in Istio's fields and order, text or JSON, to stdout.

A finished connection is ``connection complete`` at info, or at error if it ended badly; one that was denied
is at error too, with the policy that did it; one that never came about is ``connection failed`` at warn; openings are
at debug. Strings come from certificates and the wire, so they are always quoted.
"""

from __future__ import annotations

import json
import logging
from functools import lru_cache
from typing import Final

from ztunnel.core.attributes import Ends
from ztunnel.core.messages import ConnectionEvent
from ztunnel.io.logs import level_name, timestamp

SCOPE: Final = "access"
_ADDRESSES = frozenset({"src.addr", "dst.addr", "dst.hbone_addr"})
Value = str | int


def level_of(event: ConnectionEvent) -> int:
    match event.event:
        case "opened":
            return logging.DEBUG
        case "closed":
            return logging.ERROR if event.error else logging.INFO
        case "denied":
            return logging.ERROR
        case "failed":
            return logging.WARNING
    return logging.NOTSET


def message_of(event: ConnectionEvent) -> str:
    return {"opened": "connection opened", "failed": "connection failed"}.get(event.event, "connection complete")


def denial_text(event: ConnectionEvent) -> str:
    """Why a connection was denied, in Istio's words; the policy's ``namespace/name`` where one did it."""
    if event.policy:
        return f"connection closed due to policy rejection: explicitly denied by: {event.policy}"
    if event.error in ("", "default_deny"):
        return "connection closed due to policy rejection: allow policies exist, but none allowed"
    return f"connection closed due to policy rejection: {event.error}"


def fields(event: ConnectionEvent, ends: Ends) -> dict[str, Value]:
    """The fields in their order; what is not known is left out."""
    error = denial_text(event) if event.event == "denied" else event.error
    source, destination = ends.source, ends.destination
    found: dict[str, Value] = {
        "src.addr": event.source_address,
        "src.workload": source.name,
        "src.namespace": source.namespace,
        "src.identity": event.source_identity or (source.principal if event.protocol == "hbone" else ""),
        "src.cluster": source.cluster,
        "dst.addr": event.destination_address,
        "dst.hbone_addr": event.hbone_address,
        "dst.service": ends.service_host,
        "dst.workload": destination.name,
        "dst.namespace": destination.namespace,
        "dst.identity": event.destination_identity or (destination.principal if event.protocol == "hbone" else ""),
        "dst.cluster": destination.cluster,
        "direction": "outbound" if event.reporter == "source" else "inbound",
    }
    found = {key: value for key, value in found.items() if value != ""}
    if event.event != "opened":
        found["bytes_sent"] = event.sent
        found["bytes_recv"] = event.received
        found["duration"] = f"{round(event.duration_ms)}ms"
    if event.protocol == "kernel":
        found["connection_security_policy"] = "kernel"
        if event.policy:
            found["policy"] = event.policy
    if error:
        found["error"] = error
    return found


@lru_cache(maxsize=4096)
def _quoted(text: str) -> str:
    return json.dumps(text)


def _text(key: str, value: Value) -> str:
    return str(value) if isinstance(value, int) or key in _ADDRESSES else _quoted(value)


def text_line(event: ConnectionEvent, ends: Ends) -> str:
    pairs = " ".join(f"{key}={_text(key, value)}" for key, value in fields(event, ends).items())
    return f"{timestamp(event.at)}\t{level_name(level_of(event))}\t{SCOPE}\t{message_of(event)}\t{pairs}"


def json_line(event: ConnectionEvent, ends: Ends) -> str:
    head: dict[str, Value] = {
        "level": level_name(level_of(event)),
        "time": timestamp(event.at),
        "scope": SCOPE,
        "message": message_of(event),
    }
    return json.dumps({**head, **fields(event, ends)})


def template(event: ConnectionEvent, ends: Ends, form: str) -> str:
    """The line of an event that ended a connection, with ``%s`` in place of, in this order: the time, the port of
    the source, bytes sent, bytes received, milliseconds. It ends with a line feed."""
    quote = '"' if form == "json" else ""
    host = event.source_address.rpartition(":")[0]
    own = {"src.addr": f"{quote}{host}:%s{quote}", "bytes_sent": "%s", "bytes_recv": "%s", "duration": '"%sms"'}
    level, message = level_name(level_of(event)), message_of(event)
    found = {
        key: own[key] if key in own else (json.dumps(value) if form == "json" else _text(key, value)).replace("%", "%%")
        for key, value in fields(event, ends).items()
    }
    if form != "json":
        return f"%s\t{level}\t{SCOPE}\t{message}\t" + " ".join(f"{key}={value}" for key, value in found.items()) + "\n"
    head = {"level": f'"{level}"', "time": '"%s"', "scope": f'"{SCOPE}"', "message": f'"{message}"'}
    return "{" + ", ".join(f'"{key}": {value}' for key, value in {**head, **found}.items()) + "}\n"


def line(event: ConnectionEvent, ends: Ends, form: str) -> str | None:
    """The line for an event at the current log level; None if it is not logged. ``form`` is text or json."""
    level = level_of(event)
    if level == logging.NOTSET or not logging.getLogger(SCOPE).isEnabledFor(level):
        return None
    return json_line(event, ends) if form == "json" else text_line(event, ends)
