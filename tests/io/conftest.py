"""A scripted API server with a client of it, and a control plane."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from ambient.io.kube import KubeClient
from ambient.io.kube_auth import Credentials
from tests.io.kube_api import Api
from tests.support.control import ControlPlane, Now


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    yield Api()


@pytest.fixture
async def client(api: Api) -> AsyncIterator[KubeClient]:
    app = web.Application(client_max_size=1 << 26)
    app.router.add_route("*", "/{path:.*}", api.handle)
    server = TestServer(app)
    await server.start_server()
    made = KubeClient(Credentials(str(server.make_url("")).rstrip("/"), token="secret"))
    yield made
    api.ended.set()
    await made.close()
    await server.close()


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    async with ControlPlane(tmp_path, Now(time.time())) as running:
        yield running
