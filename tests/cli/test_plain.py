"""Which sockets of an enrolled pod are plain connections, and how such a one is shown."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from ambient.cli.flows import PATHS, kernel_row, with_rates
from ambient.cli.plain import Looker, Pod, is_accepted, is_plain, plain_row
from ambient.cli.watch import Rates
from ambient.datapath.render import Names
from ambient.datapath.values import EnrolledValue
from ambient.io.sock_diag import TcpSocket, data_bytes

POD = Pod("shop/a", EnrolledValue("10.0.0.1", "fd00::1", 1), frozenset({8080}))
NAMES = Names(addresses={"10.0.0.9": "outside/x", "10.96.0.7": "outside/web"})
DIALLED = TcpSocket(2, 1, "10.0.0.1", 40000, "10.0.0.9", 9000, cookie=5, sent=6, received=7, cgroup=3)
"""One that pod a opened; its SYN counts as a byte."""
TAKEN = TcpSocket(2, 1, "10.0.0.1", 8080, "10.0.0.9", 41000, cookie=6, sent=7, received=5, cgroup=3)
MESH = 77
NAMES_OF = ("source", "destination", "client", "server", "original", "identity", "policy", "service", "state")
KERNEL = dict.fromkeys((*NAMES_OF, "acceleration"), "") | {"sent_redirected": 0, "received_redirected": 0, "age_s": 1.0}


def plain(found: TcpSocket, flows: frozenset[int] = frozenset()) -> bool:
    return is_plain(POD, found, flows, lambda ident: ident == MESH)


def test_a_connection_nobody_else_has_is_plain() -> None:
    assert plain(DIALLED) and plain(TAKEN)


@pytest.mark.parametrize(
    "change",
    [
        {"remote": "127.0.0.1", "remote_port": 15001},
        {"remote": "::1"},
        {"remote": "10.0.0.1"},
        {"remote": "fd00::1"},
        {"cgroup": MESH},
        {"state": 3},
    ],
)
def test_what_is_captured_the_pods_own_the_meshs_or_not_yet_there_is_not(change: dict[str, object]) -> None:
    assert not plain(replace(DIALLED, **change))  # type: ignore[arg-type]


def test_a_flow_of_the_kernel_path_is_not() -> None:
    assert not plain(DIALLED, frozenset({5})) and plain(DIALLED, frozenset({6}))


def test_bytes_are_the_clients_whichever_end_is_seen() -> None:
    out, into = plain_row(POD, DIALLED, NAMES, "not_mesh"), plain_row(POD, TAKEN, NAMES, "bypass")
    assert (out["source"], out["destination"], out["direction"]) == ("shop/a", "outside/x", "outbound")
    assert (out["client"], out["server"], out["original"]) == ("10.0.0.1:40000", "10.0.0.9:9000", "10.0.0.9:9000")
    assert (into["source"], into["destination"], into["direction"]) == ("outside/x", "shop/a", "inbound")
    assert (into["client"], into["server"]) == ("10.0.0.9:41000", "10.0.0.1:8080")
    assert (out["sent"], out["received"]) == (into["sent"], into["received"]) == (5, 7)
    assert is_accepted(POD, TAKEN) and not is_accepted(POD, DIALLED)
    assert (out["path"], out["age_s"], out["reason"], into["reason"]) == ("plain", None, "not_mesh", "bypass")
    assert plain_row(POD, replace(DIALLED, remote="192.0.2.1"), NAMES, "not_mesh")["destination"] == ""


def test_an_end_of_stream_is_no_byte_of_data() -> None:
    for state, extra_out, extra_in in ((5, 1, 0), (8, 0, 1), (9, 1, 1)):
        closing = replace(DIALLED, state=state, sent=6 + extra_out, received=7 + extra_in)
        assert data_bytes(closing, accepted=False) == (5, 7)
        assert plain_row(POD, closing, NAMES, "")["state"] == "closing"
    assert data_bytes(replace(DIALLED, state=2, sent=0, received=0), accepted=False) == (0, 0)


def test_plain_rows_have_the_columns_of_all_flows_and_rates() -> None:
    row = {"node": "n1", **plain_row(POD, DIALLED, NAMES, "not_mesh")}
    assert row["path"] in PATHS and set(row) == {"node", *kernel_row(KERNEL, 1, 2)}
    rates = Rates()
    with_rates(rates, 1.0, [row])
    assert with_rates(rates, 2.0, [{**row, "received": 17}])[0]["bytes_per_s"] == 10


def test_a_namespace_that_cannot_be_looked_at_is_named() -> None:
    maps: Any = SimpleNamespace(
        settings=None,
        enrolled={5: EnrolledValue("10.0.0.1", "", 1), 6: EnrolledValue("10.0.0.2", "", 2)},
        flows={},
    )
    with open(os.devnull) as no_namespace:
        looker = Looker(maps, Names({1: "shop/a", 2: "shop/b"}), {6: no_namespace.fileno()})
        assert looker.rows() == []
    first, second = looker.unseen
    assert first == "shop/a: its network namespace is gone, or may not be entered: run as root"
    assert second.startswith("shop/b: setns to network namespace")
