"""A control plane on loopback, with tokens that are given out by the test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from ambient.control.certificates import Caller, PodFacts
from ambient.io.ca import Authority
from ambient.io.xds_server import ControlServer
from ambient.settings import ControlSettings, NodeSettings
from ambient.xds.server import Server

SERVER_NAME = "control.test"
NODE_ACCOUNT = "ambient-system/ambient-node"


@dataclass
class Now:
    """A clock that the test moves."""

    at: float

    def __call__(self) -> float:
        return self.at


@dataclass
class ControlPlane:
    """``async with ControlPlane(...)``: the server runs; `node` gives the settings of a node that may call it."""

    directory: Path
    clock: Now
    more: dict[str, object] = field(default_factory=dict)
    callers: dict[str, Caller] = field(default_factory=dict)
    pods: dict[str, list[PodFacts]] = field(default_factory=dict)
    discovery: Server = field(default_factory=Server)
    reviewed: list[str] = field(default_factory=list)
    review_error: Exception | None = None
    port: int = 0

    async def __aenter__(self) -> Self:
        self.settings = ControlSettings(
            **{  # type: ignore[arg-type]
                "listen": (f"127.0.0.1:{self.port}",),
                "data_dir": str(self.directory / "data"),
                "server_names": (SERVER_NAME,),
                **self.more,
            }
        )
        self.authority = Authority.open(self.settings, self.clock())
        self.server = ControlServer(
            self.settings, self.discovery, self.authority, self.review, self.pods_on_node, self.clock
        )
        await self.server.start()
        self.port = self.server.ports[0]
        (self.directory / "roots.pem").write_text(self.authority.bundle_pem)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.server.stop()

    async def review(self, token: str) -> Caller | None:
        self.reviewed.append(token)
        if self.review_error is not None:
            raise self.review_error
        return self.callers.get(token)

    def pods_on_node(self, node: str) -> Iterable[PodFacts]:
        return self.pods.get(node, ())

    def node(self, name: str = "n1", **more: object) -> NodeSettings:
        """Settings of a node; the first call for a name makes its pod and token."""
        token = self.directory / f"token-{name}"
        if not token.exists():
            token.write_text(f"token-{name}\n")
            namespace, account = NODE_ACCOUNT.split("/")
            uid = f"uid-{name}"
            self.callers[f"token-{name}"] = Caller(namespace, account, f"ambient-node-{name}", uid, name)
            self.pods.setdefault(name, []).append(
                PodFacts(uid, f"ambient-node-{name}", namespace, account, host_network=True)
            )
        values: dict[str, object] = {
            "node_name": name,
            "control_address": f"127.0.0.1:{self.port}",
            "control_server_name": SERVER_NAME,
            "ca_root_file": str(self.directory / "roots.pem"),
            "token_file": str(token),
        }
        return NodeSettings(**{**values, **more})  # type: ignore[arg-type]


async def until(condition: Callable[[], bool], what: str = "", timeout_s: float = 10.0) -> None:
    """Wait until the condition holds, looking often."""
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110  # the conditions are of foreign state, which sets no event
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s} s: {what or condition}") from None


class Background(AsyncExitStack):
    """Tasks that end with the test, and whose failure fails it."""

    def start(self, coroutine: object) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(coroutine)  # type: ignore[arg-type]
        self.push_async_callback(_end, task)
        return task


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        pass
