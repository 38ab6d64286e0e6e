"""The admin endpoint's server: limits on bytes, time and number, and nobody kept out by who only connects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from ztunnel.core.http1 import HEAD_BYTES_MAX, Answer, Request, text
from ztunnel.io import http_server
from ztunnel.io.http_server import CONNECTIONS_MAX, HttpServer

LARGE = 32 * 1024 * 1024
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
pytestmark = pytest.mark.timeout(30)


def head(method: str, target: str) -> bytes:
    return f"{method} {target} HTTP/1.1\r\nHost: node\r\n\r\n".encode("ascii")


class Served:
    """A server on a unix socket; /wait answers when ``release`` is set. ``waiting`` counts what was asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.release = asyncio.Event()
        self.waiting = asyncio.Semaphore(0)
        views = {"/": self.hello, "/fail": self.fail, "/large": self.large, "/wait": self.wait}
        self.server = HttpServer(
            {**{path: {"GET": view} for path, view in views.items()}, "/set": {"POST": self.hello}}
        )

    async def hello(self, request: Request) -> Answer:
        return text(f"{request.method} {request.query.get('a', '')}\n")

    async def fail(self, request: Request) -> Answer:
        raise RuntimeError("a bug")

    async def large(self, request: Request) -> Answer:
        self.waiting.release()
        return Answer(bytes(LARGE))

    async def wait(self, request: Request) -> Answer:
        self.waiting.release()
        await self.release.wait()
        return text("at last\n")

    async def connect(self) -> Streams:
        return await asyncio.open_unix_connection(self.path)

    async def say(self, raw: bytes) -> bytes:
        """All that is answered until the server ends the connection."""
        reader, writer = await self.connect()
        writer.write(raw)
        try:
            return await reader.read()
        finally:
            writer.close()


@asynccontextmanager
async def serving(directory: Path) -> AsyncIterator[Served]:
    served = Served(directory / "http.sock")
    await served.server.listen_unix(served.path)
    try:
        yield served
    finally:
        await served.server.close()


@contextmanager
def limit(name: str, seconds: float = 0.05) -> Iterator[None]:
    """One that a test need not wait for, or that cannot be what it sees."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_server, name, seconds)
        yield


async def test_a_request_is_answered_and_the_connection_ends(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        raw = await served.say(head("GET", "/?a=b") + head("GET", "/?a=second"))
        assert raw.startswith(b"HTTP/1.1 200 OK\r\n") and raw.endswith(b"\r\n\r\nGET b\n")
        assert b"second" not in raw and raw.count(b"HTTP/1.1") == 1
        assert (await served.say(b"POST /set HTTP/1.0\r\n\r\n")).endswith(b"\r\n\r\nPOST \n")


async def test_an_answer_to_head_has_no_body(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        raw = await served.say(head("HEAD", "/"))
        assert b"\r\nContent-Length: 6\r\n" in raw and raw.endswith(b"\r\n\r\n")


async def test_a_request_that_arrives_in_pieces_is_put_together(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        reader, writer = await served.connect()
        for byte in head("GET", "/"):
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
        assert (await reader.read()).endswith(b"GET \n")
        writer.close()


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"nonsense\r\n\r\n", b"400 Bad Request"),
        (head("GET", "/none"), b"404 Not Found"),
        (head("POST", "/"), b"405 Method Not Allowed"),
        (head("HEAD", "/set"), b"405 Method Not Allowed"),
        (
            b"GET / HTTP/1.1\r\nHost: node\r\nx: " + bytes(HEAD_BYTES_MAX).replace(b"\0", b"x"),
            b"431 Request Header Fields Too Large",
        ),
    ],
)
async def test_what_cannot_be_answered_is_refused(tmp_path: Path, raw: bytes, status: bytes) -> None:
    async with serving(tmp_path) as served:
        assert (await served.say(raw)).startswith(b"HTTP/1.1 " + status + b"\r\n")


async def test_a_view_that_fails_is_an_error_of_that_request_only(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        assert (await served.say(head("GET", "/fail"))).startswith(b"HTTP/1.1 500 ")
        assert (await served.say(head("GET", "/"))).startswith(b"HTTP/1.1 200 ")


async def test_a_client_that_says_nothing_is_told_that_its_time_is_over(tmp_path: Path) -> None:
    with limit("HEAD_S"):
        async with serving(tmp_path) as served:
            assert (await served.say(b"GET / HT")).startswith(b"HTTP/1.1 408 ")


async def test_a_client_that_does_not_read_is_cut_off(tmp_path: Path) -> None:
    with limit("READ_S"), limit("STOP_S", 60.0):
        async with serving(tmp_path) as served:
            reader, writer = await served.connect()
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(head("GET", "/large"))
            await served.waiting.acquire()
            async with asyncio.timeout(10):
                await served.server.close()
            writer.transport.resume_reading()  # type: ignore[attr-defined]
            assert len(await reader.read()) < LARGE
            writer.close()


async def test_a_client_that_reads_slowly_gets_all(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        assert len(await served.say(head("GET", "/large"))) > LARGE


async def test_who_waited_longest_on_its_client_makes_room(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        crowd = [await served.connect() for _ in range(CONNECTIONS_MAX)]
        assert (await served.say(head("GET", "/"))).endswith(b"GET \n")
        assert await crowd[0][0].read() == b""
        crowd[1][1].write(head("GET", "/"))
        assert (await crowd[1][0].read()).endswith(b"GET \n"), "only the first had to go"
        for _, writer in crowd:
            writer.close()


async def test_what_is_being_answered_makes_no_room(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        crowd = [asyncio.create_task(served.say(head("GET", "/wait"))) for _ in range(CONNECTIONS_MAX)]
        for _ in crowd:
            await served.waiting.acquire()
        refused = await served.connect()
        assert await refused[0].read() == b""
        refused[1].close()
        served.release.set()
        assert all(raw.endswith(b"at last\n") for raw in await asyncio.gather(*crowd))
        assert (await served.say(head("GET", "/"))).endswith(b"GET \n")


async def test_closing_gives_what_is_being_answered_its_time_and_ends_the_rest(tmp_path: Path) -> None:
    with limit("STOP_S"):
        async with serving(tmp_path) as served:
            silent = await served.connect()
            stuck = asyncio.create_task(served.say(head("GET", "/wait")))
            await served.waiting.acquire()
            await served.server.close()
            assert await silent[0].read() == b"" and await stuck == b""
            with pytest.raises(ConnectionError):
                await served.connect()
            silent[1].close()
