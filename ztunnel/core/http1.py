"""One request and its answer, as the admin endpoint speaks HTTP/1.1: h11 knows the protocol, the rules are here.

A request has a method, a path, a query and no body, and its connection ends with the answer, so nothing behind it is
ever read as another.
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import Final
from urllib.parse import parse_qsl, unquote

import h11

HEAD_BYTES_MAX: Final = 16 * 1024
"""Of the request line and all headers."""
PARAMETERS_MAX: Final = 32
TEXT: Final = "text/plain; charset=utf-8"
JSON: Final = "application/json"


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


class Exchange:
    """`receive` until there is a request or the refusal of one, then `answer`, once."""

    __slots__ = ("_http", "_is_head")

    def __init__(self) -> None:
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)
        self._is_head = False

    def receive(self, data: bytes) -> Request | Answer | None:
        """What the client sent next. Returns None for a part of a request, an Answer for what is none."""
        try:
            self._http.receive_data(data)
            event = self._http.next_event()
            if not isinstance(event, h11.Request):
                return None
            if not isinstance(self._http.next_event(), h11.EndOfMessage):
                return text("no request here has a body\n", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        except h11.RemoteProtocolError as error:
            return text(f"{error}\n", HTTPStatus(error.error_status_hint))
        self._is_head = event.method == b"HEAD"
        return _request(event.method.decode("ascii"), event.target.decode("ascii"))

    def answer(self, answer: Answer, date: str) -> bytes:
        """As bytes. ``date`` is as in HTTP; HEAD gets no body."""
        headers = [
            ("Date", date),
            ("Content-Type", answer.content_type),
            ("Content-Length", str(len(answer.body))),
            *([("Allow", ", ".join(answer.allow))] if answer.allow else []),
            ("Connection", "close"),
        ]
        body = [] if self._is_head else [h11.Data(answer.body)]
        head = h11.Response(status_code=answer.status.value, reason=answer.status.phrase, headers=headers)
        return b"".join(self._http.send(event) or b"" for event in (head, *body, h11.EndOfMessage()))


def _request(method: str, target: str) -> Request | Answer:
    path, _, query = target.partition("?")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=PARAMETERS_MAX)
        return Request(method, unquote(path, errors="strict"), dict(pairs))
    except ValueError:
        return text(f"the address is not UTF-8, or has more than {PARAMETERS_MAX} parameters\n", HTTPStatus.BAD_REQUEST)
