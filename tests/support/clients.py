"""The C clients of the proofs: built once, run in pods, told what to do on standard input."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ambient.lab.driver import Background
from tests.support.mesh import PORT, Mesh

SOURCES = Path(__file__).resolve().parents[1] / "proof" / "clients"
JIFFIES_PER_S = os.sysconf("SC_CLK_TCK")


@functools.cache
def built(name: str) -> str:
    """The path of a client's program; compiled on first use, beside others' if they build at the same time."""
    directory = Path(tempfile.gettempdir()) / f"ambient-proof-{os.getpid()}"
    directory.mkdir(exist_ok=True)
    program = directory / name
    subprocess.run(
        ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(SOURCES / f"{name}.c")], check=True
    )
    return str(program)


def load_server() -> list[str]:
    """The command of a pod that answers `load drive`."""
    return [built("load"), "serve", str(PORT)]


class Load:
    """Steady load from a pod; every connection is counted. See tests/proof/clients/load.c."""

    def __init__(self, background: Background) -> None:
        self._background = background

    def say(self, command: str) -> None:
        stdin = self._background.process.stdin
        assert stdin is not None
        stdin.write(command + "\n")
        stdin.flush()

    def mark(self) -> None:
        self.say("mark")

    def kill(self, pid: int, number: int = 9) -> None:
        """The client itself signals the process, and times what comes from there."""
        self.say(f"kill {pid} {number}")

    def report(self, limit_s: float = 5.0) -> dict[str, Any]:
        """What became of the connections since `mark` or `kill`."""
        self.say("report")
        return self._read(limit_s)

    def finish(self, limit_s: float = 15.0) -> dict[str, Any]:
        """End all connections and report the last window."""
        self.say("finish")
        return self._read(limit_s)

    def await_ok(self, count: int, limit_s: float) -> dict[str, Any]:
        """Wait until so many connections of the window succeeded; the report, whatever it says, after the limit."""
        self.say(f"wait {count} {int(limit_s * 1000)}")
        return self._read(limit_s + 5)

    def await_age(self, age_s: float) -> dict[str, Any]:
        """The report once the window is so old."""
        return self.await_ok(1 << 30, age_s)

    def _read(self, limit_s: float) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._background.await_output('{"since"', limit_s))
        return found


@contextmanager
def load(
    mesh: Mesh, namespace: str, client: str, host: str, port: int = 80, *, rate: int = 200, kept: int = 4
) -> Iterator[Load]:
    """Load from a pod while the body runs; begins when a first connection succeeded."""
    command = [built("load"), "drive", host, str(port), str(rate), str(kept)]
    with mesh.background(namespace, client, *command) as running:
        found = Load(running)
        first = found.await_ok(20, 10)
        assert first["ok"] >= 20, first
        yield found


def started_at(pid: int) -> float:
    """When a process began, in seconds of CLOCK_MONOTONIC, to a hundredth; OSError if there is none."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    boot_offset = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
    return int(fields[19]) / JIFFIES_PER_S - boot_offset


def children(pid: int) -> dict[int, str]:
    """Direct children of a process and their short names."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        try:
            found[int(child)] = Path(f"/proc/{child}/comm").read_text().strip()
        except OSError:
            continue
    return found


class Steady:
    """Connections that stay open and move bytes, or the server of such. See tests/proof/clients/steady.c."""

    def __init__(self, background: Background) -> None:
        self._background = background

    def _ask(self, command: str, limit_s: float = 10.0, answer: str = '{"open"') -> dict[str, Any]:
        stdin = self._background.process.stdin
        assert stdin is not None
        stdin.write(command + "\n")
        stdin.flush()
        found: dict[str, Any] = json.loads(self._background.await_output(answer, limit_s))
        return found

    @property
    def said(self) -> str:
        """The first of what it complained of."""
        return "; ".join(self._background.skipped[:5])

    def report(self) -> dict[str, Any]:
        return self._ask("report")

    def kill(self, pid: int) -> dict[str, Any]:
        """Signal a process with SIGKILL; the report as of that moment."""
        return self._ask(f"kill {pid} 9")

    def ends(self) -> set[tuple[str, str]]:
        """Both ends of the open connections, the own one first. Connections to two servers may share a port."""
        return {(own, remote) for own, remote in self._ask("ends", answer='{"ends"')["ends"]}

    def pause(self) -> None:
        """No more messages begin."""
        self._ask("pause")

    def go(self) -> None:
        self._ask("go")

    def finish(self, limit_s: float = 20.0) -> dict[str, Any]:
        """End all connections properly; the report when all have ended."""
        return self._ask("finish", limit_s)


@contextmanager
def steady_server(mesh: Mesh, namespace: str, name: str, port: int) -> Iterator[Steady]:
    with mesh.background(namespace, name, built("steady"), "serve", str(port)) as running:
        running.await_output("listening")
        yield Steady(running)


@contextmanager
def steady(
    mesh: Mesh,
    namespace: str,
    name: str,
    mode: str,
    *targets: str,
    count: int = 1,
    size: int = 4096,
    pause_us: int = 40000,
) -> Iterator[Steady]:
    """``count`` connections to each ADDRESS:PORT; begins when all are connected."""
    words = [built("steady"), "drive", mode, str(size), str(pause_us), str(count), *targets]
    with mesh.background(namespace, name, *words) as running:
        running.await_output("connected")
        yield Steady(running)
