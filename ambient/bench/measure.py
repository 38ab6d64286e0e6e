"""One measurement: one work on one path, with what the kernel says about the path it took."""

from __future__ import annotations

import json
import re
import select
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

from ambient.bench import usage
from ambient.bench.objects import ENVOY_OUT, HTTP_PORT, LOAD_PORT
from ambient.bench.plan import Path, Work
from ambient.errors import PlatformFault
from ambient.io.bpf_maps import Maps
from ambient.lab import cgroups, lifecycle, record
from ambient.lab.driver import Driver

LATE_S = 40.0
Values = dict[str, float]


@dataclass(frozen=True, slots=True)
class Site:
    """A path on its lab: where the client is, and where it finds the server."""

    path: Path
    driver: Driver
    load: File
    server: str
    """Address of the server's pod."""

    def target(self, port: int) -> tuple[str, int]:
        return ("127.0.0.1", ENVOY_OUT + port) if self.path.envoy else (self.server, port)

    @property
    def cgroups(self) -> list[File]:
        mount = cgroups.mount_point()
        return [File(mount / node.cgroup) for node in self.driver.lab.plans()]

    def start(self, *command: str) -> subprocess.Popen[str]:
        """A program in the client's pod; its standard input is ours to close."""
        found = record.read(self.driver.lab.name)
        argv, env = lifecycle.exec_line(found, self.path.namespace, "client", "", command)
        return subprocess.Popen(
            argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def counters(self) -> dict[str, int]:
        """The client's node's; empty without a mesh."""
        if not self.path.mesh:
            return {}
        with Maps.open(str(self.driver.lab.bpffs / "node1")) as maps:
            return maps.counters()

    def redirected(self) -> int:
        """Bytes that live flows to the server have moved from socket to socket so far."""
        if not self.path.acceleration:
            return 0
        with Maps.open(str(self.driver.lab.bpffs / "node1")) as maps:
            flows: Any = getattr(maps, "flows", None)
            found = flows.items() if flows is not None else ()
            ends = [e for key, flow in found if key.local == self.server for e in (flow.client, flow.server)]
            return sum(int(end.redirect_bytes) for end in ends)


def measure(site: Site, work: Work, seconds: float) -> Values:
    """Raises PlatformFault if the work failed or its connections took another path than they should."""
    before, cpu = site.counters(), usage.cpu_s(site.cgroups)
    values = _http(site, work, seconds) if work.kind.startswith("http") else _load(site, work, seconds)
    spent = usage.cpu_s(site.cgroups) - cpu
    count = values.get("count", 0.0)
    if count:
        values["cpu_us"] = spent / count * 1e6
    values["cpu_total_s"] = spent
    after = site.counters()
    for reason in ("captured", "kernel"):
        if reason in before or reason in after:
            values[reason] = after.get(reason, 0) - before.get(reason, 0)
    if wrong := another_path(site.path, values):
        raise PlatformFault(f"{work.name} on {site.path.name}: {wrong}")
    return values


def another_path(path: Path, values: Values) -> str:
    """What is wrong with the path that connections took, as the kernel counted them; empty if nothing is."""
    captured, kernel = values.get("captured", 0), values.get("kernel", 0)
    if not path.mesh:
        return ""
    if path.acceleration in ("direct", "redirect"):
        if captured:
            return f"{captured:g} of {captured + kernel:g} connections went through ztunnel"
        return "" if kernel else "no connection was authorized in the kernel"
    if kernel:
        return f"{kernel:g} of {captured + kernel:g} connections were authorized in the kernel"
    return "" if captured else "no connection was captured"


def _load(site: Site, work: Work, seconds: float) -> Values:
    host, port = site.target(LOAD_PORT)
    words = (str(site.load), work.kind, host, str(port), str(work.number), f"{seconds:g}")
    values, redirected = converse(site.start(*words), seconds, site.redirected)
    if site.path.acceleration and "bytes" in values:
        total = values["bytes"] * (2 if work.kind == "rtt" else 1)
        values |= {"redirected_bytes": redirected, "native_bytes": max(0.0, total - redirected)}
    return values


def converse(process: subprocess.Popen[str], seconds: float, look: Callable[[], int]) -> tuple[Values, int]:
    """The client's line, and what ``look`` saw while its connections were still open. Raises PlatformFault."""
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    try:
        ready, _, _ = select.select((process.stdout,), (), (), seconds + LATE_S)
        line = process.stdout.readline() if ready else ""
        seen = look() if line else 0
        process.stdin.close()
        process.wait(10)
        if not line or process.returncode:
            raise PlatformFault(f"the client failed: {process.stderr.read().strip()[-500:] or 'no answer'}")
        return json.loads(line), seen
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()
        process.stderr.close()


def _http(site: Site, work: Work, seconds: float) -> Values:
    host, port = site.target(HTTP_PORT if work.kind == "http" else LOAD_PORT)
    threads = 1 if work.number == 1 else 2
    options = (f"-t{threads}", f"-c{work.number}", f"-d{max(1, round(seconds))}s", "--latency", "--timeout", "10s")
    process = site.start("wrk", *options, f"http://{host}:{port}/")
    redirected = 0
    try:
        try:
            process.wait(0.7 * max(1.0, seconds))
        except subprocess.TimeoutExpired:
            redirected = site.redirected()
        out, error = process.communicate(timeout=seconds + LATE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise PlatformFault(f"wrk did not end within {seconds + LATE_S:g} s") from None
    if process.returncode:
        raise PlatformFault(f"wrk: {(error or out).strip()[-500:]}")
    values = read_wrk(out)
    if site.path.acceleration:
        values["redirected_bytes_seen"] = redirected
    return values


_UNITS = {"us": 1.0, "ms": 1e3, "s": 1e6, "m": 6e7}


def read_wrk(out: str) -> Values:
    """Requests per second, quantiles and errors of wrk's output. Raises PlatformFault if it is none."""
    rate = re.search(r"Requests/sec:\s+([\d.]+)", out)
    count = re.search(r"(\d+) requests in", out)
    quantiles = {q: (float(v), unit) for q, v, unit in re.findall(r"(50|99)%\s+([\d.]+)(us|ms|s|m)", out)}
    if not (rate and count and "50" in quantiles and "99" in quantiles):
        raise PlatformFault(f"wrk said {out.strip()[-300:]!r}")
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", out)
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", out)
    return {
        "per_s": float(rate[1]),
        "count": float(count[1]),
        "p50_us": quantiles["50"][0] * _UNITS[quantiles["50"][1]],
        "p99_us": quantiles["99"][0] * _UNITS[quantiles["99"][1]],
        "errors": float((sum(map(int, errors.groups())) if errors else 0) + (int(refused[1]) if refused else 0)),
    }
