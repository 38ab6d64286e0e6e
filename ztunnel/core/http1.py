"""A request of HTTP/1.1 as the admin endpoint understands it, and an answer as bytes. Pure.

Only what such an endpoint is asked: a method, a path, a query, and no body. One connection carries one request, so
nothing after it is ever read as another; what is not plainly a request is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final
from urllib.parse import parse_qsl, unquote

HEAD_BYTES_MAX: Final = 16 * 1024
"""Of the request line and all headers."""
PARAMETERS_MAX: Final = 32
TEXT: Final = "text/plain; charset=utf-8"
JSON: Final = "application/json"

_REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) (/[\x21-\x7e]*) HTTP/1\.[01]")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)")


@dataclass(frozen=True, slots=True)
class Request:
    """``query`` has the last value of each name."""

    method: str
    path: str
    query: dict[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """``allow`` names the methods that would do, where the request's does not."""

    body: bytes
    status: HTTPStatus = HTTPStatus.OK
    content_type: str = TEXT
    allow: tuple[str, ...] = ()


def text(body: str, status: HTTPStatus = HTTPStatus.OK) -> Answer:
    return Answer(body.encode(), status)


def read_head(head: bytes) -> Request | Answer:
    """``head`` ends with the empty line. Returns the refusal for what is no request, or one with a body."""
    line, *headers = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    found = _REQUEST_LINE.fullmatch(line)
    if found is None:
        return text("this is no request of HTTP/1.1 with a path\n", HTTPStatus.BAD_REQUEST)
    for header in headers:
        field = _HEADER.fullmatch(header)
        if field is None:
            return text("a header is malformed\n", HTTPStatus.BAD_REQUEST)
        name, value = field[1].lower(), field[2].strip()
        if name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0")):
            return text("no request here has a body\n", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    path, _, query = found[2].decode("ascii").partition("?")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=PARAMETERS_MAX)
        return Request(found[1].decode("ascii"), unquote(path, errors="strict"), dict(pairs))
    except ValueError:
        return text(f"the address is not UTF-8, or has more than {PARAMETERS_MAX} parameters\n", HTTPStatus.BAD_REQUEST)


def encode(answer: Answer, date: str, *, body: bool = True) -> bytes:
    """``date`` is as in HTTP; without ``body`` for an answer to HEAD. The connection ends with the answer."""
    lines = [
        f"HTTP/1.1 {answer.status.value} {answer.status.phrase}",
        f"Date: {date}",
        f"Content-Type: {answer.content_type}",
        f"Content-Length: {len(answer.body)}",
        *([f"Allow: {', '.join(answer.allow)}"] if answer.allow else []),
        "Connection: close",
    ]
    head = "\r\n".join(lines).encode("ascii") + b"\r\n\r\n"
    return head + answer.body if body else head
