"""Drive a lab from outside, with the commands a user types: what the demo and the tests stand on.

Nothing here reaches into the lab's processes: `ambient lab`, `kubectl` and `tcpdump` are run as programs, and what
is judged is what they print and what crosses the wire.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from ambient.errors import PlatformFault
from ambient.lab.topology import UNDERLAY_BRIDGE, Lab
from ambient.lab.wire import Segment, read_capture

T = TypeVar("T")

COMMAND_TIMEOUT_S = 120.0
UP_TIMEOUT_S = 240.0


class CommandFailed(PlatformFault):
    """A program ended with another exit code than 0; the message holds its words."""


class Driver:
    """One lab by name. ``up`` starts it; ``down`` removes it and may be called at any time, also twice."""

    def __init__(self, name: str, nodes: int = 2, ipv6: bool = True) -> None:
        self.lab = Lab(name, nodes, ipv6)

    @property
    def kubeconfig(self) -> str:
        return str(self.lab.kubeconfig)

    def up(self, files: Sequence[str | Path], *options: str, echo: bool = False) -> None:
        words = ["lab", "up", "--name", self.lab.name, "--nodes", str(self.lab.nodes), *options]
        for file in files:
            words += ["-f", str(file)]
        self.ambient(*words, timeout_s=UP_TIMEOUT_S, echo=echo)

    def down(self) -> None:
        self.ambient("lab", "down", "--name", self.lab.name)

    def ambient(self, *words: str, timeout_s: float = COMMAND_TIMEOUT_S, check: bool = True, echo: bool = False) -> str:
        """Run the command line; its standard output. ``echo``: its talk goes to our stderr as it comes."""
        return self.run([sys.executable, "-m", "ambient", *words], timeout_s=timeout_s, check=check, echo=echo)

    def rows(self, *words: str) -> list[dict[str, Any]]:
        """Rows of a command that shows the nodes of this lab, as `-o json` gives them."""
        found: list[dict[str, Any]] = json.loads(self.ambient(*words, "--lab", self.lab.name, "-o", "json") or "[]")
        return found

    def kubectl(self, *words: str, stdin: str | None = None, check: bool = True) -> str:
        return self.run(["kubectl", "--kubeconfig", self.kubeconfig, *words], stdin=stdin, check=check)

    def get(self, *words: str) -> Any:
        """`kubectl get ... -o json`."""
        return json.loads(self.kubectl("get", *words, "-o", "json"))

    def pods(self, namespace: str) -> dict[str, dict[str, Any]]:
        """Pods of a namespace by their ``app`` label, or by name where they have none."""
        items = self.get("pods", "-n", namespace)["items"]
        return {p["metadata"].get("labels", {}).get("app", p["metadata"]["name"]): p for p in items}

    def exec(self, namespace: str, pod: str, *command: str, check: bool = True, timeout_s: float = 30.0) -> str:
        """Run a program in a pod: its name, or deploy/NAME for one of a Deployment's."""
        words = ["lab", "exec", "--name", self.lab.name, "-n", namespace, pod, "--", *command]
        return self.ambient(*words, check=check, timeout_s=timeout_s)

    @contextlib.contextmanager
    def background(self, namespace: str, pod: str, *command: str) -> Iterator[Background]:
        """A program that runs in a pod while the body runs; its standard input closes at the end."""
        argv = [sys.executable, "-m", "ambient", "lab", "exec", "--name", self.lab.name, "-n", namespace, pod, "--"]
        process = subprocess.Popen(
            [*argv, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            yield Background(process)
        finally:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: str | None = None,
        timeout_s: float = COMMAND_TIMEOUT_S,
        check: bool = True,
        echo: bool = False,
    ) -> str:
        try:
            done = subprocess.run(
                argv,
                input=stdin,
                stdin=None if stdin is not None else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=None if echo else subprocess.PIPE,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except FileNotFoundError:
            raise PlatformFault(f"{argv[0]} is not installed") from None
        except subprocess.TimeoutExpired:
            raise PlatformFault(f"{' '.join(argv)[:300]}: no end after {timeout_s:g} s") from None
        if check and done.returncode:
            said = (done.stderr or "").strip() or done.stdout.strip()
            raise CommandFailed(f"{' '.join(argv)[:300]}: exit code {done.returncode}: {said[-2000:]}")
        return done.stdout

    @contextlib.contextmanager
    def capture(self, expression: str = "tcp") -> Iterator[Capture]:
        """Capture what crosses the underlay between nodes while the body runs."""
        with tempfile.TemporaryDirectory(prefix="ambient-wire-") as directory:
            path = Path(directory) / "wire.pcap"
            argv = ["ip", "netns", "exec", self.lab.underlay_netns]
            argv += [
                "tcpdump",
                "-i",
                UNDERLAY_BRIDGE,
                "-U",
                "-w",
                str(path),
                "--immediate-mode",
                "-B",
                "16384",
                expression,
            ]
            process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            found = Capture(path)
            try:
                _Lines(process.stderr).wait("listening on")
                yield found
                found.settle()
            finally:
                process.terminate()
                process.wait(10)
                if process.stderr is not None:
                    process.stderr.close()
                if path.exists():
                    found.raw = path.read_bytes()


class Background:
    """A program that runs in a pod."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._lines = _Lines(process.stdout)

    @property
    def skipped(self) -> list[str]:
        """Lines that were not the ones waited for."""
        return self._lines.skipped

    def await_output(self, text: str, limit_s: float = 10.0) -> str:
        """The first line with ``text``. PlatformFault with what was printed instead."""
        return self._lines.wait(text, limit_s)


class Capture:
    """The packets of one capture; complete once its ``with`` block has ended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.raw = b""

    def settle(self, quiet_s: float = 0.3, limit_s: float = 3.0) -> None:
        """Wait until tcpdump wrote nothing for a while, so that the last packets are there."""
        deadline, size, since = time.monotonic() + limit_s, -1, time.monotonic()
        while time.monotonic() < deadline and time.monotonic() - since < quiet_s:
            now = os.path.getsize(self._path) if self._path.exists() else 0
            if now != size:
                size, since = now, time.monotonic()
            select.select((), (), (), 0.02)

    @property
    def segments(self) -> tuple[Segment, ...]:
        return read_capture(self.raw)

    def contains(self, text: str) -> bool:
        """Whether the text is readable anywhere in the captured bytes."""
        return text.encode() in self.raw

    def to_port(self, port: int) -> int:
        return sum(port in s.ports for s in self.segments)


class _Lines:
    """Lines of a pipe; one that came together with another is not lost between two waits."""

    def __init__(self, stream: IO[str] | None) -> None:
        assert stream is not None
        self._fd = stream.fileno()
        self._rest = b""
        self.skipped: list[str] = []

    def wait(self, text: str, limit_s: float = 10.0) -> str:
        """The next line with ``text``. PlatformFault with what came instead."""
        deadline = time.monotonic() + limit_s
        while True:
            line, newline, rest = self._rest.partition(b"\n")
            if newline:
                self._rest = rest
                found = line.decode(errors="replace")
                if text in found:
                    return found
                self.skipped.append(found)
                continue
            ready, _, _ = select.select((self._fd,), (), (), max(0.0, deadline - time.monotonic()))
            more = os.read(self._fd, 65536) if ready else b""
            if not more:
                said = "\n".join(self.skipped)[-500:] + line.decode(errors="replace")[-500:]
                raise PlatformFault(f"waited in vain for a line with {text!r}; there was {said!r}")
            self._rest += more


def eventually(look: Callable[[], T], limit_s: float, what: str, pause_s: float = 0.1) -> T:
    """The first true value of ``look()``. PlatformFault naming ``what`` and the last failure after ``limit_s``."""
    deadline = time.monotonic() + limit_s
    last = ""
    while True:
        try:
            found = look()
            if found:
                return found
        except (PlatformFault, ValueError, KeyError, IndexError) as error:
            last = f" ({error})"
        if time.monotonic() > deadline:
            raise PlatformFault(f"waited {limit_s:g} s in vain for {what}{last}")
        select.select((), (), (), pause_s)
