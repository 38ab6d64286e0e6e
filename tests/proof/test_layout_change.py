"""Another layout of the maps is loaded while redirected bytes move: none is lost, the old sockhash only drains and goes
with its last socket, and what is new is the new layout's.

A lab of its own runs from a copy of the programs, in which LAYOUT_VERSION is changed; the node's processes are then
stopped and started with the lab's own commands, as an upgrade does. Every byte is checked on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ambient.io import bpf_sys
from ambient.io.bpf_maps import Maps
from ambient.lab.driver import eventually
from ambient.manifest.acceleration import ACCELERATION
from tests.support.clients import Steady, steady, steady_server
from tests.support.kernel_path import await_kernel_path
from tests.support.mesh import IDLE, PORT, authorization, pod
from tests.support.upgrade import CopiedMesh

pytestmark = [pytest.mark.lab, pytest.mark.net]

STEADY_PORT = 7110
SIZE = 4096
BOTH_WAYS, STREAMS, REFUSED, LATER = 30, 6, 5, 8
HEAD = 32
"""Bytes that begin each connection; see tests/proof/clients/steady.c."""


@pytest.fixture
def pair(neighbour: CopiedMesh) -> Iterator[str]:
    """a and c talk to b, all on node1; a and b ask for `redirect`."""
    words, direct = {"annotations": {ACCELERATION: "redirect"}}, {"annotations": {ACCELERATION: "direct"}}
    pods = [pod("a", command=IDLE, **words), pod("b", **words), pod("c", command=IDLE, **direct)]
    with neighbour.namespace(*pods) as name:
        with Maps.open(neighbour.settings("node1").bpffs_dir) as maps:
            for client in ("c", "a"):  # all of them, so that no pod that is new to the World voids verdicts later
                await_kernel_path(neighbour, maps, name, neighbour.address(name, "b"), PORT, client)
        yield name


def held(pins: Path) -> int:
    """How many sockets a layout's sockhash holds."""
    table = bpf_sys.Table(bpf_sys.obj_get(str(pins / "maps/sockets")), "sockets")
    try:
        return len(table.list_keys())
    finally:
        table.close()


def around_tcp(mesh: CopiedMesh, namespace: str, *clients: Steady) -> int:
    """How many of the bytes that a's connections sent so far never were in a segment. They pause meanwhile."""
    for one in clients:
        one.pause()

    def still() -> tuple[int, int] | None:
        def look() -> tuple[int, int]:
            text = mesh.exec(namespace, "a", "ss", "-tniOH", "dport", "=", f":{STEADY_PORT}")
            acknowledged = [int(found) for found in re.findall(r"bytes_acked:(\d+)", text)]
            assert len(acknowledged) == sum(one.report()["open"] for one in clients)
            # of each, TCP counts the SYN, and we do not count the head
            return sum(acknowledged) - len(acknowledged) * (1 + HEAD), sum(one.report()["sent"] for one in clients)

        found = look()
        return found if found == look() else None

    native, sent = eventually(still, 10, "what was sent to arrive") or (0, 0)
    for one in clients:
        one.go()
    return sent - native


def restart_with_another_layout(mesh: CopiedMesh) -> tuple[Path, Path]:
    """Pin directories of the old and of the new layout."""
    directory = Path(mesh.settings("node1").bpffs_dir)
    old, new = mesh.layout, mesh.change_layout()
    assert old != new
    mesh.ambient("lab", "stop", "--name", mesh.lab.name, "node1")
    mesh.ambient("lab", "start", "--name", mesh.lab.name, "node1")

    def loaded() -> bool:
        found = mesh.agent("node1")
        return bool(found["layout"] == new and found["ready"] and found["complete"])

    eventually(loaded, 60, "the new layout to be at work")
    return directory / old, directory / new


def rows_of(mesh: CopiedMesh, ends: set[tuple[str, str]]) -> list[dict[str, Any]]:
    """What the layout that is at work knows of these connections; empty until it knows all of them."""
    clients = {own for own, _ in ends}
    rows = [row for row in mesh.rows("flows", "--node", "node1") if row["client"] in clients]
    rows = [row for row in rows if row["path"] in ("direct", "redirect")]
    return rows if len(rows) == len(clients) else []


def redirects(mesh: CopiedMesh, ends: set[tuple[str, str]]) -> int:
    return sum(int(row["redirected"]) for row in rows_of(mesh, ends))


def pins_of(layout: Path) -> list[str]:
    return sorted(path.name for path in (layout / "maps").iterdir())


def test_no_byte_is_lost_the_old_layout_drains_and_what_is_new_is_the_new_ones(
    neighbour: CopiedMesh, pair: str
) -> None:
    b = f"{neighbour.address(pair, 'b')}:{STEADY_PORT}"
    with (
        steady_server(neighbour, pair, "b", STEADY_PORT) as server,
        steady(neighbour, pair, "a", "d", b, count=BOTH_WAYS, pause_us=10000) as both,
        steady(neighbour, pair, "a", "s", b, count=STREAMS, size=16384, pause_us=2000) as streams,
        steady(neighbour, pair, "c", "e", b, count=REFUSED) as refused,
    ):
        moving = both.ends() | streams.ends()
        eventually(lambda: redirects(neighbour, moving) > 5_000_000, 15, "bytes to be redirected")

        old, new = restart_with_another_layout(neighbour)

        # the flows are known to the new layout, move on, and from now on natively only
        taken = eventually(lambda: rows_of(neighbour, moving | refused.ends()), 15, "the flows to be taken over")
        assert {row["path"] for row in taken} == {"direct"}
        assert sorted(path.name for path in old.iterdir()) == ["maps"]
        eventually(lambda: pins_of(old) == ["settings", "sockets"], 5, "the rest of the old layout to be gone")
        assert (held(old), held(new)) == (2 * len(moving), 0)
        assert neighbour.agent("node1")["draining"] == [old.name]
        redirected, sent = around_tcp(neighbour, pair, both, streams), streams.report()["sent"]
        assert redirected > 5_000_000 / 2, "of both directions one is a's"
        eventually(lambda: streams.report()["sent"] > sent + 5_000_000, 10, "bytes to move")
        assert around_tcp(neighbour, pair, both, streams) == redirected
        for one, count in ((both, BOTH_WAYS), (streams, STREAMS), (refused, REFUSED)):
            now = one.report()
            assert (now["open"], now["lost"], now["wrong"]) == (count, 0, 0), (now, one.said)

        # what is new is the new layout's
        with steady(neighbour, pair, "a", "d", b, count=LATER, pause_us=5000) as later:
            fresh = later.ends()
            eventually(lambda: redirects(neighbour, fresh) > 500_000, 15, "new bytes to be redirected")
            assert (held(old), held(new)) == (2 * len(moving), 2 * LATER)
            ends = [finished(later, LATER)]

        # a right that is lost ends what the old layout let in, and nothing else
        neighbour.apply(pair, authorization("no", "DENY", "b", f"cluster.local/ns/{pair}/sa/c"))
        eventually(lambda: refused.report()["lost"] == REFUSED, 10, "c's connections to be closed")
        lost = refused.report()
        assert (both.report()["open"], streams.report()["open"]) == (BOTH_WAYS, STREAMS)

        # the last socket ends the old layout
        ends += [finished(both, BOTH_WAYS), finished(streams, STREAMS), lost]
        eventually(lambda: not server.report()["open"], 5, "the server to see the ends")
        heard = server.report()
        assert (heard["lost"], heard["wrong"], heard["enomem"]) == (REFUSED, 0, 0), (heard, server.said)
        # each of c's may have had one message on its way
        assert 0 <= sum(end["sent"] for end in ends) - heard["got"] <= REFUSED * SIZE
        assert 0 <= heard["sent"] - sum(end["got"] for end in ends) <= REFUSED * SIZE
        eventually(lambda: not old.exists(), 5, "the old layout to be gone")
        eventually(lambda: not neighbour.agent("node1")["draining"], 5, "the agent to say so")
        assert new.exists()
        eventually(lambda: not neighbour.rows("maps", "flows", "--node", "node1"), 5, "no flow is left in the map")
        assert not neighbour.rows("diff", "--node", "node1")


def finished(client: Steady, count: int) -> dict[str, int]:
    end = client.finish()
    assert (end["ended"], end["lost"], end["wrong"], end["enomem"]) == (count, 0, 0, 0), (end, client.said)
    return end
