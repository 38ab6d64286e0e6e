"""The admin endpoint's sockets: a port in use does not matter, the unix socket is private and given up with care."""

from __future__ import annotations

import asyncio
import socket
import stat
from pathlib import Path

import aiohttp

from ambient.settings import NodeSettings
from ztunnel.core.dump import Json
from ztunnel.io.admin import Admin


class Views:
    def __init__(self) -> None:
        self.waiting: list[str] = []
        self.now = "info"

    def pending(self) -> list[str]:
        return self.waiting

    def config_dump(self) -> Json:
        return {"a": 1}

    def certificates(self) -> Json:
        return []

    async def connections(self) -> Json:
        raise TimeoutError

    def metrics(self) -> bytes:
        return b"x 1\n"

    def level(self) -> str:
        return self.now

    def set_level(self, level: str) -> None:
        self.now = level


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def admin(directory: Path, views: Views, **ports: int) -> Admin:
    values = {"admin_port": 0, "metrics_port": 0, "readiness_port": 0, **ports}
    return Admin(NodeSettings(node_name="n", run_dir=str(directory), **values), views)


async def get(url: str, path: Path | None = None) -> tuple[int, str]:
    connector = aiohttp.UnixConnector(str(path)) if path else None
    async with aiohttp.ClientSession(connector=connector) as session, session.get(url) as response:
        return response.status, await response.text()


async def test_a_port_in_use_is_left_out_and_the_rest_serves(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        metrics, readiness = free_port(), free_port()
        found = admin(
            tmp_path, Views(), admin_port=taken.getsockname()[1], metrics_port=metrics, readiness_port=readiness
        )
        await found.start()
        assert (await get("http://x/config_dump", tmp_path / "ztunnel.sock"))[0] == 200
        assert await get(f"http://127.0.0.1:{metrics}/stats/prometheus") == (200, "x 1\n")
        assert await get(f"http://127.0.0.1:{metrics}/metrics") == (200, "x 1\n")
        assert await get(f"http://127.0.0.1:{readiness}/healthz/ready") == (200, "ready\n")
        assert (await get(f"http://127.0.0.1:{metrics}/config_dump"))[0] == 404, "only metrics leave the node"
        await found.stop()


async def test_the_admin_port_serves_on_loopback_only(tmp_path: Path) -> None:
    port = free_port()
    found = admin(tmp_path, Views(), admin_port=port)
    await found.start()
    assert (await get(f"http://127.0.0.1:{port}/ready"))[0] == 200
    with socket.create_server(("127.0.0.2", port)):
        pass  # nobody listens on every address
    await found.stop()


async def test_readiness_names_what_is_pending(tmp_path: Path) -> None:
    views = Views()
    found = admin(tmp_path, views)
    await found.start()
    views.waiting = ["state manager", "proxy"]
    status, text = await get("http://x/healthz/ready", tmp_path / "ztunnel.sock")
    assert (status, text) == (500, "not ready, pending: state manager, proxy\n")
    assert (await get("http://x/connections", tmp_path / "ztunnel.sock"))[0] == 504
    await found.stop()


async def test_the_unix_socket_is_private_replaces_a_stale_one_and_spares_a_successors(tmp_path: Path) -> None:
    path = tmp_path / "ztunnel.sock"
    old, new = admin(tmp_path, Views()), admin(tmp_path, Views())
    await old.start()
    await new.start()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    await old.stop()
    assert (await get("http://x/ready", path))[0] == 200
    await new.stop()
    assert not path.exists()


async def test_the_port_of_a_ztunnel_that_drains_is_taken_over_when_it_has_ended(tmp_path: Path) -> None:
    """Or an upgrade would end the metrics."""
    port = free_port()
    old = admin(tmp_path, Views(), admin_port=port)
    await old.start()
    views = Views()
    views.now = "debug"
    new = admin(tmp_path, views, admin_port=port)
    await new.start()
    await old.stop()
    try:
        async with aiohttp.ClientSession() as session, asyncio.timeout(10):
            while True:
                try:
                    async with session.get(f"http://127.0.0.1:{port}/logging") as response:
                        assert "debug" in await response.text()
                        break
                except aiohttp.ClientConnectionError:
                    await asyncio.sleep(0.05)
    finally:
        await new.stop()
