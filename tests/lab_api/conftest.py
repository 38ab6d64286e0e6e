"""A real API server on a loopback port, a clock that tests move, and the kubectl binaries there are."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ambient.io.kube_auth import from_kubeconfig
from ambient.lab.apiserver.history import History
from ambient.lab.apiserver.http import ApiServer
from ambient.lab.apiserver.schema import NODE
from ambient.lab.apiserver.settings import ApiSettings
from ambient.lab.apiserver.store import Sources, Store
from tests.lab_api.objects import node
from tests.support.require import require


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for a condition; TimeoutError if it does not come."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - any condition, not one event
            await asyncio.sleep(0.01)


class Clock:
    """Time that passes only when told to."""

    def __init__(self, moment: datetime) -> None:
        self.moment = moment

    def __call__(self) -> datetime:
        return self.moment

    def advance(self, seconds: float) -> None:
        self.moment += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))


@pytest.fixture
def new_store(clock: Clock) -> Callable[..., Store]:
    """Make a Store: ``new_store(changes_max=..., service_ranges=..., objects_max=...)``."""

    def make(changes_max: int = 4096, **sources: Any) -> Store:
        numbers, suffixes = itertools.count(1), itertools.count()
        made = Sources(now=clock, uid=lambda: f"uid-{next(numbers)}", suffix=lambda: f"{next(suffixes):05d}", **sources)
        return Store(made, History(first_version=100, changes_max=changes_max))

    return make


@pytest.fixture
def store(new_store: Callable[..., Store]) -> Store:
    return new_store()


@dataclass
class Cluster:
    """A running server and an HTTP session of its administrator."""

    server: ApiServer
    url: str
    session: aiohttp.ClientSession
    kubeconfig: Path
    tls: ssl.SSLContext
    clock: Clock

    @property
    def store(self) -> Store:
        return self.server.store

    async def call(self, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        """Status code and decoded answer."""
        if body is not None:
            options.setdefault("headers", {}).setdefault("Content-Type", "application/json")
            options["data"] = body if isinstance(body, bytes) else json.dumps(body)
        async with self.session.request(method, self.url + path, **options) as response:
            text = await response.read()
            return response.status, json.loads(text) if text else None


@pytest.fixture
async def new_cluster(tmp_path: Path, clock: Clock) -> AsyncIterator[Callable[..., Any]]:
    """Start a server: ``await new_cluster(changes_max=..., ...)``; all are stopped afterwards."""
    running: list[Cluster] = []

    async def start(*, real_time: bool = False, **settings: Any) -> Cluster:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        if not real_time:
            settings["now"] = clock
        server = ApiServer([listener], ApiSettings(**settings))
        await server.start()
        path = tmp_path / f"kubeconfig-{len(running)}"
        path.write_text(server.kubeconfig(url))
        tls = from_kubeconfig(str(path)).tls
        assert tls is not None
        session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls), read_bufsize=1 << 22)
        running.append(Cluster(server, url, session, path, tls, clock))
        return running[-1]

    yield start
    for cluster in running:
        await cluster.session.close()
        await cluster.server.stop()


@pytest.fixture
async def cluster(new_cluster: Callable[..., Any]) -> Cluster:
    made: Cluster = await new_cluster()
    return made


def kubectls() -> list[str]:
    """kubectl of the path, and further ones named in AMBIENT_KUBECTLS (colon-separated paths)."""
    further = [path for path in os.environ.get("AMBIENT_KUBECTLS", "").split(":") if path]
    return [shutil.which("kubectl") or "kubectl", *further]


class Kubectl:
    """Runs a kubectl against a cluster."""

    def __init__(self, program: str, cluster: Cluster, home: Path) -> None:
        self.program = program
        self.cluster = cluster
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(home), "KUBECONFIG": str(cluster.kubeconfig)}

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            self.program,
            *arguments,
            env=self.environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def run(self, *arguments: str, stdin: str = "") -> tuple[int, str, str]:
        process = await self.start(*arguments)
        out, err = await asyncio.wait_for(process.communicate(stdin.encode()), 20)
        return process.returncode or 0, out.decode(), err.decode()

    async def ok(self, *arguments: str, stdin: str = "") -> str:
        code, out, err = await self.run(*arguments, stdin=stdin)
        assert code == 0, f"kubectl {' '.join(arguments)}: {err}"
        return out

    async def fails(self, *arguments: str, stdin: str = "") -> str:
        code, out, err = await self.run(*arguments, stdin=stdin)
        assert code != 0, f"kubectl {' '.join(arguments)}: {out}"
        return err


@pytest.fixture(
    params=kubectls(), ids=lambda path: Path(path).name if path.startswith("/usr") else path.replace("/", "_")
)
async def kubectl(request: pytest.FixtureRequest, new_cluster: Callable[..., Any], tmp_path: Path) -> Kubectl:
    require(request.param)
    return Kubectl(request.param, await new_cluster(real_time=True), tmp_path)


@pytest.fixture
def two_nodes(store: Store) -> Store:
    for name in ("n1", "n2"):
        store.create(NODE, "", node(name))
    return store
