"""Requests of the admin endpoint: what is one is read, anything else is refused and never raises."""

from __future__ import annotations

from http import HTTPStatus
from urllib.parse import quote, urlencode

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ztunnel.core.http1 import PARAMETERS_MAX, Answer, Request, encode, read_head

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def status(head: bytes) -> int:
    found = read_head(head)
    assert isinstance(found, Answer)
    return found.status.value


@given(path=WORDS, query=st.dictionaries(WORDS, WORDS, max_size=PARAMETERS_MAX))
def test_path_and_query_are_read_as_they_were_meant(path: str, query: dict[str, str]) -> None:
    target = f"/{quote(path)}" + (f"?{urlencode(query)}" if query else "")
    head = f"GET {target} HTTP/1.1\r\nHost: node\r\nAccept: */*\r\n\r\n".encode("ascii")
    assert read_head(head) == Request("GET", "/" + path, query)


@given(st.binary(max_size=300))
@example(b"GET / HTTP/1.1\r\n\r\n")
@example(b"\r\n\r\n")
@example(b"GET /?%ff HTTP/1.1\r\n\r\n")
def test_whatever_arrives_is_a_request_or_refused(raw: bytes) -> None:
    found = read_head(raw + b"\r\n\r\n")
    assert isinstance(found, Request) or found.status >= 400


@pytest.mark.parametrize(
    "line",
    [
        b"GET / HTTP/1.2",
        b"GET / HTTP/2.0",
        b"GET /",
        b"get / HTTP/1.1",
        b"GET  / HTTP/1.1",
        b"GET http://node/ HTTP/1.1",
        b"GET /a b HTTP/1.1",
        b"GET /\n HTTP/1.1",
        b"GET / HTTP/1.1\n",
        b"GET /%ff HTTP/1.1",
        b"GET /?a=%ff HTTP/1.1",
        b"GET /?" + b"&".join(b"a%d=" % n for n in range(PARAMETERS_MAX + 1)) + b" HTTP/1.1",
    ],
)
def test_a_request_line_that_is_not_plain_is_refused(line: bytes) -> None:
    assert status(line + b"\r\n\r\n") == 400


@pytest.mark.parametrize(
    "header", [b" folded", b"name", b"na me: x", b"name : x", b"name: x\0", b"name: a\nb: c", b":"]
)
def test_a_malformed_header_is_refused(header: bytes) -> None:
    assert status(b"GET / HTTP/1.1\r\nHost: node\r\n" + header + b"\r\n\r\n") == 400


@pytest.mark.parametrize("header", [b"Content-Length: 1", b"content-length:\t007", b"Transfer-Encoding: chunked"])
def test_a_body_is_refused(header: bytes) -> None:
    assert status(b"POST / HTTP/1.1\r\n" + header + b"\r\n\r\n") == 413


def test_an_empty_body_is_none() -> None:
    assert isinstance(read_head(b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n"), Request)


def test_an_answer_tells_its_length_and_that_the_connection_ends() -> None:
    answer = Answer(b"ab\n", HTTPStatus.METHOD_NOT_ALLOWED, allow=("GET", "HEAD"))
    head = (
        b"HTTP/1.1 405 Method Not Allowed\r\nDate: now\r\nContent-Type: text/plain; charset=utf-8\r\n"
        b"Content-Length: 3\r\nAllow: GET, HEAD\r\nConnection: close\r\n\r\n"
    )
    assert encode(answer, "now") == head + b"ab\n"
    assert encode(answer, "now", body=False) == head
