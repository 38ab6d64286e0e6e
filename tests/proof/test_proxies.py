"""TCP proxies that splice() are exact, by default and also under `redirect`.

node1: client ---- proxy ---- server, all on the kernel's path. splice() does not see redirected bytes, but these
proxies are recognised by how they wait: Go (io.Copy) by edges, HAProxy for RDHUP. Their sockets are never redirected.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ambient.errors import PlatformFault
from ambient.io.bpf_maps import Maps
from ambient.lab.driver import Background
from ambient.manifest.acceleration import ACCELERATION
from tests.support.clients import built
from tests.support.flows import Witness
from tests.support.mesh import IDLE, PORT, Mesh, pod, service
from tests.support.require import require
from tests.support.software import Site, go_proxy, haproxy, shared_directory, spliced

Tell = Callable[[str, Witness], None]
pytestmark = [pytest.mark.lab, pytest.mark.net]

COUNT, BYTES = 24, 1_000_000
"""Connections; most of at most so many bytes each way, one in five of over six times as many."""
FLOWS, TOTAL = 4, 10_000_000
"""Connections that are busy both ways at once, and bytes of each."""
IDLE_S = 2
"""HAProxy's timeouts where it is to splice: after so long a busy connection is looked at again, and then spliced."""
HALVES = ("both", "client_first", "server_first")
IN_TURNS = ("client_first", "server_first")
"""HAProxy 2.6 cuts off what is on its way when both ends half-close at the same time, also without a mesh."""
PROXIES = ("goproxy", "copying", "splicing")


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    require("go", "haproxy", "gcc")
    with shared_directory() as found:
        yield found


def sees_all(mesh: Mesh) -> bool:
    """Whether this kernel's splice() sees redirected bytes, so that `auto` means `redirect`."""
    return "auto_redirect" in mesh.agent("node1")["acceleration"]["kernel"]


@pytest.fixture(scope="module", params=["auto", "redirect"])
def site(mesh: Mesh, directory: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    own = directory / request.param
    own.mkdir()
    words = {"annotations": {ACCELERATION: request.param}}
    pods = [go_proxy("server:80", **words)]
    pods += [haproxy(own, "copying", "server:80", **words)]
    pods += [haproxy(own, "splicing", "server:80", "option splice-auto", idle_s=IDLE_S, **words)]
    pods += [pod(name, command=IDLE, **words) for name in ("client", "server")]
    services = [service(name) for name in ("server", *PROXIES)]
    with Maps.open(mesh.settings("node1").bpffs_dir) as maps, mesh.namespace(*services, *pods) as name:
        redirects = request.param == "redirect" or sees_all(mesh)
        found = Site(mesh, maps, name, own, "redirect" if redirects else "direct")
        found.await_kernel_path("client", *PROXIES)
        for proxy in PROXIES:
            found.await_kernel_path(proxy, "server")
        yield found


@pytest.fixture(scope="module")
def duplex(tmp_path_factory: pytest.TempPathFactory) -> str:
    require("gcc")
    binary = tmp_path_factory.mktemp("duplex") / "duplex"
    source = Path(__file__).resolve().parents[1] / "net/clients/duplex.c"
    subprocess.run(["gcc", "-Wall", "-Werror", "-O1", "-pthread", "-o", binary, source], check=True)
    return str(binary)


def half_closing(site: Site, proxy: str, *ends: str) -> None:
    """Exact in both directions, with ends and half-ends passed on; AssertionError if not."""
    drive = (built("exact"), "drive", site.vip(proxy), "80", str(COUNT), str(BYTES), "7", "5", *ends)
    with site.background("server", built("exact"), "serve", str(PORT)) as server:
        server.await_output("listening")
        with site.background("client", *drive) as client:
            driven = json.loads(client.await_output('{"most"', 40))
            said = client.skipped[:5]
        assert server.process.stdin is not None
        server.process.stdin.close()
        served = json.loads(server.await_output('{"most"', 15))
        said += server.skipped[:5]
    for side in (driven, served):
        assert (side["wrong"], side["early"], side["broken"], side["open"]) == (0, 0, 0, 0), (said, driven, served)
        assert sum(side[end] for end in ends) == COUNT
    assert driven["bytes_sent"] == served["bytes_got"] > 6 * BYTES < driven["bytes_got"] == served["bytes_sent"]


Outcome = dict[str, Any] | str


def full_duplex(site: Site, proxy: str, binary: str, total: int, limit_s: float = 40.0) -> list[Outcome]:
    """What client and server say of ``FLOWS`` connections, each with ``total`` bytes both ways at once.

    Their counts; or, as soon as one says so, the first wrong byte; or nothing, if there was no end in time.
    """
    words = (str(FLOWS), "n", str(total), "65536", "500", "k", "0", "7")
    with site.background("server", binary, "serve", "::", str(PORT), *words) as server:
        server.await_output("listening")
        with site.background("client", binary, "dial", site.vip(proxy), "80", *words) as client:
            found: list[Outcome] = ["", ""]
            deadline = time.monotonic() + limit_s
            while "" in found and not any("byte" in side for side in found) and time.monotonic() < deadline:
                for index, process in enumerate((client, server)):
                    found[index] = found[index] or outcome(process)
            for side, process in zip(found, (client, server), strict=True):
                if isinstance(side, str):
                    process.process.kill()
    return found


def outcome(process: Background) -> Outcome:
    try:
        line = process.await_output("wrong", 0.1)
    except PlatformFault:
        return ""
    if not line.startswith("{"):
        return line
    found: dict[str, Any] = json.loads(line)
    return found


def is_exact(found: list[Outcome], total: int) -> bool:
    wanted = (0, FLOWS * total, FLOWS * total)
    return all(
        not isinstance(side, str) and (side["wrong"], side["sent"], side["received"]) == wanted for side in found
    )


def test_a_go_proxy_that_splices_is_exact_whatever_is_asked_for(site: Site, tell: Tell) -> None:
    with site.watch("goproxy") as front, site.watch("server") as back:
        half_closing(site, "goproxy", *HALVES)
        assert pipes(site) > 2, "it has spliced: its pipes are kept for the next time"
    tell("client to Go", front)
    tell("Go to server", back)
    assert front.redirected == back.redirected == 0


def pipes(site: Site) -> int:
    """Open ends of pipes of the Go proxy; two are its event loop's own."""
    script = (
        "for p in /proc/[0-9]*; do"
        ' [ "$(readlink $p/ns/net)" = "$(readlink /proc/self/ns/net)" ] && [ "$(cat $p/comm)" = proxy ]'
        " && ls -l $p/fd; done | grep -c pipe:"
    )
    return int(site.run("sh", "-c", script, pod="goproxy"))


def test_haproxy_is_exact_whatever_is_asked_for(site: Site, tell: Tell, duplex: str) -> None:
    with site.watch("copying") as front, site.watch("server") as back:
        half_closing(site, "copying", *IN_TURNS)
        found = full_duplex(site, "copying", duplex, TOTAL)
    assert is_exact(found, TOTAL), found
    tell("client to HAProxy", front)
    tell("HAProxy to server", back)
    assert front.redirected == back.redirected == 0
    assert spliced(site.directory, "copying") == 0


def test_haproxy_that_splices_is_exact_whatever_is_asked_for(site: Site, tell: Tell, duplex: str) -> None:
    with site.watch("splicing") as front, site.watch("server") as back:
        half_closing(site, "splicing", *IN_TURNS)
        for times in (5, 10, 20):  # until they last longer than IDLE_S
            found = full_duplex(site, "splicing", duplex, times * TOTAL)
            if not is_exact(found, times * TOTAL) or spliced(site.directory, "splicing"):
                break
    assert is_exact(found, times * TOTAL), found
    tell("client to HAProxy with splice-auto", front)
    tell("HAProxy with splice-auto to server", back)
    assert front.redirected == back.redirected == 0
    assert spliced(site.directory, "splicing") > TOTAL
