"""A rule that drops the packets of a redirected connection stops it within ten seconds, although redirected bytes pass
no rule: each direction sends a message natively at least so often, and one that is dropped keeps it native; so does one
whose acknowledgement is dropped.

node1: a asks b and waits for each answer (7101), and streams to b (7102). Every byte is checked on both sides.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import FlowValue
from ambient.io.bpf_maps import Maps
from ambient.lab.driver import eventually
from ambient.manifest.acceleration import ACCELERATION
from tests.support.clients import steady, steady_server
from tests.support.kernel_path import await_kernel_path
from tests.support.mesh import IDLE, PORT, Mesh, pod
from tests.support.require import require

pytestmark = [pytest.mark.lab, pytest.mark.net]

ASKS, STREAMS = 7101, 7102
STOPS_S = 10.0
SLACK_S = 0.5
QUIET_S = 1.5
"""Nothing came for so long: it has stopped. Both flows send every hundredth of a second."""
FRESH_S = 1.5
"""A native message that went so recently is not repeated at once, so the rule is met by redirected ones first."""


@pytest.fixture(scope="module")
def maps(mesh: Mesh) -> Iterator[Maps]:
    with Maps.open(mesh.settings("node1").bpffs_dir) as found:
        yield found


@pytest.fixture(scope="module")
def pair(mesh: Mesh, maps: Maps) -> Iterator[str]:
    require("nft")
    words = {"annotations": {ACCELERATION: "redirect"}}
    with mesh.namespace(pod("a", command=IDLE, **words), pod("b", **words)) as name:
        await_kernel_path(mesh, maps, name, mesh.address(name, "b"), PORT)
        yield name


def veth_of(mesh: Mesh, namespace: str, name: str) -> str:
    """The node's end of a pod's link."""
    own = json.loads(mesh.exec(namespace, name, "ip", "-j", "link", "show", "eth0"))[0]
    links = json.loads(mesh.run(["ip", "-n", mesh.plan("node1").netns, "-j", "link"]))
    return str(next(link["ifname"] for link in links if link["ifindex"] == own["link_index"]))


@contextmanager
def dropping(mesh: Mesh, namespace: str, where: str) -> Iterator[Callable[[], None]]:
    """Drop what a sends to both ports, or what b sends back; the function given takes the rule away before the block's
    end."""
    back = where == "veth, back"
    ports = f"tcp {'sport' if back else 'dport'} {{ {ASKS}, {STREAMS} }} drop"
    if where.startswith("veth"):
        prefix = ["ip", "netns", "exec", mesh.plan("node1").netns]
        table = "netdev proof"
        hook = f'type filter hook ingress device "{veth_of(mesh, namespace, "b" if back else "a")}" priority 0;'
    else:
        prefix = []
        table = "inet proof"
        hook = "type filter hook input priority 0;"
    text = f"table {table} {{ chain drops {{ {hook} {ports}; }}; }}"

    def nft(*words: str) -> None:
        if prefix:
            subprocess.run([*prefix, "nft", *words], check=True)
        else:
            mesh.exec(namespace, "b", "nft", *words)

    nft(text)
    with ExitStack() as stack:
        stack.callback(nft, "delete", "table", *table.split())
        yield stack.close


class Watched:
    """How far one connection has come, and how many of its bytes were redirected."""

    def __init__(self, maps: Maps, address: str, port: int, progress: Callable[[], int]) -> None:
        self._maps, self._address, self._port = maps, address, port
        self.progress = progress
        self.last, self.changed = progress(), time.monotonic()

    def flow(self) -> FlowValue:
        (found,) = [v for k, v in self._maps.flows.items() if (k.local, k.local_port) == (self._address, self._port)]
        return found

    def redirected(self) -> int:
        return self.flow().client.redirect_bytes

    def redirecting(self) -> bool:
        return self.flow().client.state == LAYOUT["FLOW_REDIRECT"] and self.redirected() > 10_000

    def fresh(self) -> bool:
        return time.monotonic_ns() - self.flow().client.last_native_ns < FRESH_S * 1e9

    def look(self) -> float:
        """Since when it has not moved."""
        now = self.progress()
        if now != self.last:
            self.last, self.changed = now, time.monotonic()
        return self.changed


@pytest.mark.parametrize("where", ["veth", "veth, back", "pod"])
def test_a_drop_rule_stops_redirected_flows_in_ten_seconds_and_its_end_lets_them_go_on(
    mesh: Mesh, maps: Maps, pair: str, where: str
) -> None:
    b = mesh.address(pair, "b")
    with ExitStack() as stack:
        servers = [stack.enter_context(steady_server(mesh, pair, "b", port)) for port in (ASKS, STREAMS)]
        asking = stack.enter_context(steady(mesh, pair, "a", "e", f"{b}:{ASKS}", size=1024, pause_us=2000))
        streaming = stack.enter_context(steady(mesh, pair, "a", "s", f"{b}:{STREAMS}", size=16384, pause_us=10000))
        watched = (
            Watched(maps, b, ASKS, lambda: int(asking.report()["got"])),
            Watched(maps, b, STREAMS, lambda: int(servers[1].report()["got"])),
        )
        eventually(lambda: all(one.redirecting() and one.fresh() for one in watched), 20, "both to be redirected")
        with dropping(mesh, pair, where) as remove:
            began = time.monotonic()
            before = [(one.redirected(), one.progress()) for one in watched]
            eventually(
                lambda: all(
                    one.redirected() > redirected and one.progress() > progress
                    for one, (redirected, progress) in zip(watched, before, strict=True)
                ),
                1,
                "redirected bytes to pass beneath the rule",
                0.02,
            )
            for one in watched:
                one.changed = time.monotonic()

            def quiet() -> bool:
                """Both are looked at each time."""
                since = [one.look() for one in watched]
                return time.monotonic() - max(since) > QUIET_S

            eventually(quiet, STOPS_S + QUIET_S + 5, "both to stop", 0.05)
            took = [one.changed - began for one in watched]
            print(f"rule in the {where}: stopped after {took[0]:.1f} s (asking) and {took[1]:.1f} s (streaming)")
            assert max(took) <= STOPS_S + SLACK_S
            assert all(one.flow().client.state == LAYOUT["FLOW_NATIVE"] for one in watched)
            stopped = [(one.redirected(), one.last) for one in watched]
            assert all(one.report()["open"] == 1 for one in (asking, streaming)), "open, and waiting"
            remove()
            eventually(
                lambda: all(
                    one.redirected() > redirected and one.progress() > progress
                    for one, (redirected, progress) in zip(watched, stopped, strict=True)
                ),
                20,
                "both to go on, redirected",
            )
        ends = [one.finish() for one in (asking, streaming)]
        eventually(lambda: not any(server.report()["open"] for server in servers), 5, "the servers to see the ends")
        for end, server in zip(ends, servers, strict=True):
            heard = server.report()
            assert (end["sent"], end["got"]) == (heard["got"], heard["sent"])
            assert (end["lost"], end["wrong"], heard["lost"], heard["wrong"]) == (0, 0, 0, 0), (end, heard)
