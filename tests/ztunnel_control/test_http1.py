"""Requests of the admin endpoint: what is one is read, anything else is refused and never raises."""

from __future__ import annotations

from http import HTTPStatus
from urllib.parse import quote, urlencode

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ztunnel.core.http1 import HEAD_BYTES_MAX, PARAMETERS_MAX, Answer, Exchange, Request, text

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
HOST = b"\r\nHost: node\r\n"


def status(head: bytes) -> int:
    found = Exchange().receive(head)
    assert isinstance(found, Answer)
    return found.status.value


@given(path=WORDS, query=st.dictionaries(WORDS, WORDS, max_size=PARAMETERS_MAX), cut=st.integers(0, 400))
def test_path_and_query_are_read_as_they_were_meant(path: str, query: dict[str, str], cut: int) -> None:
    target = f"/{quote(path)}" + (f"?{urlencode(query)}" if query else "")
    head = f"GET {target} HTTP/1.1\r\nHost: node\r\nAccept: */*\r\n\r\n".encode("ascii")
    exchange = Exchange()
    found = [exchange.receive(part) for part in (head[:cut], head[cut:]) if part]
    assert found[-1] == Request("GET", "/" + path, query)
    assert found[:-1] in ([], [None])


@given(st.binary(max_size=300))
@example(b"GET / HTTP/1.1\r\nHost: node")
@example(b"\r\n\r\n")
@example(b"GET /?%ff HTTP/1.1\r\nHost: node")
def test_whatever_arrives_is_a_request_or_refused_and_can_be_answered(raw: bytes) -> None:
    exchange = Exchange()
    found = exchange.receive(raw + b"\r\n\r\n")
    assert found is None or isinstance(found, Request) or found.status >= 400
    assert exchange.answer(text("so\n"), "now").startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    "line",
    [
        b"GET /",
        b"GET  / HTTP/1.1",
        b"GET /a b HTTP/1.1",
        b"GET /\0 HTTP/1.1",
        b"GET /%ff HTTP/1.1",
        b"GET /?a=%ff HTTP/1.1",
        b"GET /?" + b"&".join(b"a%d=" % n for n in range(PARAMETERS_MAX + 1)) + b" HTTP/1.1",
    ],
)
def test_a_request_line_that_is_not_plain_is_refused(line: bytes) -> None:
    assert status(line + HOST + b"\r\n") == 400


@pytest.mark.parametrize("header", [b"name", b"na me: x", b"name : x", b"name: x\0", b": x", b"Host: other"])
def test_a_malformed_header_is_refused(header: bytes) -> None:
    assert status(b"GET / HTTP/1.1" + HOST + header + b"\r\n\r\n") == 400


@pytest.mark.parametrize(
    "header", [b"Content-Length: 1\r\n\r\n", b"Content-Length: 1\r\n\r\nx", b"Transfer-Encoding: chunked\r\n\r\n"]
)
def test_a_body_is_refused(header: bytes) -> None:
    assert status(b"POST / HTTP/1.1" + HOST + header) == 413


def test_an_empty_body_is_none() -> None:
    assert isinstance(Exchange().receive(b"POST / HTTP/1.1" + HOST + b"Content-Length: 0\r\n\r\n"), Request)


def test_a_head_without_end_is_kept_up_to_the_limit() -> None:
    exchange = Exchange()
    assert exchange.receive(b"GET /" + b"x" * (HEAD_BYTES_MAX - 5)) is None
    refused = exchange.receive(b"x")
    assert isinstance(refused, Answer) and refused.status == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE


@pytest.mark.parametrize(("method", "body"), [(b"GET", b"ab\n"), (b"HEAD", b"")])
def test_an_answer_tells_its_length_and_that_the_connection_ends(method: bytes, body: bytes) -> None:
    exchange = Exchange()
    exchange.receive(method + b" / HTTP/1.1" + HOST + b"\r\n")
    raw = exchange.answer(Answer(b"ab\n", HTTPStatus.METHOD_NOT_ALLOWED, allow=("GET", "HEAD")), "now")
    head, _, rest = raw.partition(b"\r\n\r\n")
    assert rest == body
    assert head.split(b"\r\n") == [
        b"HTTP/1.1 405 Method Not Allowed",
        b"Date: now",
        b"Content-Type: text/plain; charset=utf-8",
        b"Content-Length: 3",
        b"Allow: GET, HEAD",
        b"Connection: close",
    ]
