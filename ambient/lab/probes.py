"""Probes: asking the prober process, and the bookkeeping of successes and failures."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from dataclasses import dataclass
from typing import Any

from ambient.lab import cgroups, commands
from ambient.lab.objects import Container, Probe
from ambient.lab.topology import NodePlan

log = logging.getLogger(__name__)
_RESTART_S = 0.5
UNPROVEN_PERIOD_S = 0.25
"""How often a probe is asked that has not succeeded yet: pods of a lab start in fractions of a second."""


@dataclass(slots=True)
class Tally:
    """Consecutive results against a probe's thresholds. ``verdict`` is None until one is reached."""

    probe: Probe
    verdict: bool | None = None
    _successes: int = 0
    _failures: int = 0

    def count(self, ok: bool) -> bool | None:
        if ok:
            self._successes, self._failures = self._successes + 1, 0
            if self._successes >= self.probe.success_threshold:
                self.verdict = True
        else:
            self._successes, self._failures = 0, self._failures + 1
            if self._failures >= self.probe.failure_threshold:
                self.verdict = False
        return self.verdict


def request_of(probe: Probe, container: Container, address: str) -> dict[str, Any] | None:
    """What to ask the prober; None for probes it does not make (exec). Raises LookupError for an unknown port."""
    if probe.http_get is not None:
        get = probe.http_get
        return {
            "kind": "http",
            "host": get.host or address,
            "port": container.port(get.port),
            "path": get.path,
            "scheme": get.scheme,
            "headers": {header.name: header.value for header in get.http_headers or ()},
            "timeout": max(1, probe.timeout_seconds),
        }
    if probe.tcp_socket is not None:
        port = container.port(probe.tcp_socket.port)
        return {
            "kind": "tcp",
            "host": probe.tcp_socket.host or address,
            "port": port,
            "timeout": max(1, probe.timeout_seconds),
        }
    return None


class Prober:
    """The node's prober process, restarted if it ends. `run` until cancelled; `ask` from anywhere in the loop."""

    def __init__(self, node: NodePlan) -> None:
        self._node = node
        self._cgroup = cgroups.mount_point() / node.kubelet_cgroup
        self._process: asyncio.subprocess.Process | None = None
        self._waiting: dict[int, asyncio.Future[str]] = {}
        self._next = 0

    async def run(self) -> None:
        argv = commands.enter_argv(
            [sys.executable, "-I", "-S", _PROGRAM],
            cgroup=str(self._cgroup),
            netns=commands.netns_path(self._node.netns),
        )
        while True:
            self._process = await asyncio.create_subprocess_exec(
                *argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True
            )
            try:
                await self._read(self._process)
            finally:
                process, self._process = self._process, None
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
                for future in self._waiting.values():
                    if not future.done():
                        future.set_result("the prober ended")
                self._waiting.clear()
            log.warning("%s: the prober ended, starting another", self._node.name)
            await asyncio.sleep(_RESTART_S)

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            answer = json.loads(line)
            future = self._waiting.pop(answer["id"], None)
            if future is not None and not future.done():
                future.set_result("" if answer["ok"] else answer["message"])

    async def ask(self, request: dict[str, Any]) -> str:
        """Empty if the probe succeeded, else why not."""
        process = self._process
        if process is None or process.stdin is None:
            return "the prober is not running"
        self._next += 1
        number = self._next
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            process.stdin.write(json.dumps(request | {"id": number}).encode() + b"\n")
            await process.stdin.drain()
            async with asyncio.timeout(request["timeout"] + 5):
                return await future
        except (OSError, TimeoutError) as error:
            return f"the prober does not answer: {error}"
        finally:
            self._waiting.pop(number, None)


_PROGRAM = __file__.replace("probes.py", "prober.py")
