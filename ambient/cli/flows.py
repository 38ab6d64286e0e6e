"""`ambient flows`: every live connection the mesh knows, and the path its bytes take.

Kernel flows come from the map `flows`, ztunnel's from its admin endpoint, and what the mesh leaves alone from the
pods' sockets. A connection through two ztunnels is seen twice, once by each: as Outbound and as Inbound.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from ambient.cli.filters import Filter, filter_options
from ambient.cli.maps import read_names
from ambient.cli.output import emit, nothing, output_option
from ambient.cli.plain import Looker
from ambient.cli.pods import namespaces
from ambient.cli.target import Target, find_nodes, from_each, target_options
from ambient.cli.watch import Rates, show, ticks, watch_options
from ambient.datapath import render
from ambient.io.admin_client import ask_json
from ambient.io.bpf_maps import Maps
from ambient.io.flow_reader import FlowReader
from ambient.settings import NodeSettings

Row = dict[str, Any]
PATHS = ("redirect", "direct", "ztunnel", "plain")
_COLUMNS = (
    "node",
    "path",
    "direction",
    "source",
    "destination",
    "client",
    "server",
    "original",
    "sent",
    "received",
    "redirected",
    "age_s",
)


def ztunnel_row(found: Row) -> Row:
    """One connection of ztunnel's as a row; bytes are those to and from the destination."""
    outbound = found["direction"] == "Outbound"
    ours, theirs = found["workload"], found["remoteWorkload"]
    return {
        "path": "ztunnel",
        "source": ours if outbound else theirs,
        "destination": theirs if outbound else ours,
        "client": found["local"] if outbound else found["remote"],
        "server": found["remote"] if outbound else found["local"],
        "original": found["original"],
        "service": service_name(found["service"]),
        "sent": found["bytesSent"],
        "received": found["bytesReceived"],
        "redirected": 0,
        "age_s": round(found["durationMs"] / 1000, 1),
        "identity": found["sourceIdentity"],
        "policy": found["policy"],
        "direction": found["direction"].lower(),
        "protocol": found["protocol"].lower(),
        "state": "open",
        "acceleration": "",
        "reason": "",
    }


def service_name(host: str) -> str:
    """``name.namespace.svc.domain`` -> ``namespace/name``; anything else stays."""
    name, _, rest = host.partition(".")
    namespace, separator, _ = rest.partition(".svc.")
    return f"{namespace}/{name}" if separator and "." not in namespace else host


def kernel_row(row: Row, sent: int, received: int) -> Row:
    """A row of the map `flows` as one of all connections; bytes as the client's socket has them, -1 if unknown."""
    redirected = row["sent_redirected"] + row["received_redirected"]
    return {
        "path": "redirect" if redirected else "direct",
        "source": row["source"],
        "destination": row["destination"],
        "client": row["client"],
        "server": row["server"],
        "original": row["original"],
        "service": row["service"],
        "sent": sent if sent >= 0 else None,
        "received": received if received >= 0 else None,
        "redirected": redirected,
        "age_s": row["age_s"],
        "identity": row["identity"],
        "policy": row["policy"],
        "direction": "local",
        "protocol": "tcp",
        "state": row["state"],
        "acceleration": row["acceleration"],
        "reason": "",
    }


def kernel_flows(node: NodeSettings, path: str | None = None) -> list[Row]:
    """Of one node, what the kernel knows: the map's entries, with their sockets asked for native bytes, and plain
    connections. ``path`` spares what is not wanted. What cannot be looked at is said on stderr."""
    with Maps.open(node.bpffs_dir) as maps, ExitStack() as stack:
        spaces = namespaces(node, stack)
        names = read_names(node, maps)
        rows: list[Row] = []
        if path != "plain":
            now_ns = time.monotonic_ns()
            for flow in FlowReader(maps).live(spaces.get):
                (row,) = render.flows([(flow.key, flow.value)], names, now_ns)
                rows.append(kernel_row(row, flow.sent, flow.received))
        if path in (None, "plain"):
            looker = Looker(maps, names, spaces)
            rows += looker.rows()
            for fault in looker.unseen:
                click.echo(f"ambient: {node.node_name}: plain connections not shown: {fault}", err=True)
        return rows


def look(nodes: tuple[NodeSettings, ...], only: Filter, path: str | None) -> tuple[list[Row], bool]:
    """Every row of every node, and whether all could be looked at. What does not answer is said on stderr: without a
    ztunnel the kernel's flows are shown, and the other way round."""
    parts: list[tuple[str, list[Row]]] = []
    complete = True
    if path != "ztunnel":
        found, complete = from_each(nodes, lambda node: kernel_flows(node, path))
        parts += found
    if path in (None, "ztunnel"):
        answers, all_answered = from_each(
            nodes, lambda node: ask_json(Path(node.run_dir) / "ztunnel.sock", "/connections")["connections"]
        )
        parts += [(node, [ztunnel_row(row) for row in answer]) for node, answer in answers]
        complete = complete and all_answered
    rows = [
        {"node": node, **row}
        for node, found in parts
        for row in only.apply(found, "flows")
        if path in (None, row["path"])
    ]
    rows.sort(key=lambda row: (row["node"], PATHS.index(row["path"]), row["age_s"] or 0, row["client"]))
    return rows, complete


def with_rates(rates: Rates, now: float, rows: list[Row]) -> list[Row]:
    """Rows with bytes per second since the last look."""
    return [
        {
            **row,
            "bytes_per_s": rates.number(
                (row["node"], row["direction"], row["client"], row["server"]),
                now,
                (row["sent"] or 0) + (row["received"] or 0),
            ),
        }
        for row in rows
    ]


@click.command()
@click.option("--path", type=click.Choice(PATHS), help="Only connections on this path.")
@filter_options
@watch_options
@target_options
@output_option
def flows(
    path: str | None, only: Filter, watch: bool, interval: float, count: int | None, target: Target, output: str
) -> None:
    """Show live connections: their path (redirect, direct, ztunnel or plain), bytes, age and who talks to whom.

    \b
    redirect  authorized in the kernel, bytes moved from socket to socket
    direct    authorized in the kernel, plain TCP between the two pods
    ztunnel   through ztunnel; one row for each ztunnel the connection passes
    plain     left alone, as without a mesh; one row for each enrolled pod at an end of it, age unknown

    \b
    Example:
      ambient flows
      ambient flows --namespace shop --path direct
      ambient flows --watch -o json
    """
    nodes = find_nodes(target)
    if not watch:
        rows, complete = look(nodes, only, path)
        empty = f"no connection matches {only}" if only else "no connection is open"
        emit(rows, output, _COLUMNS, empty=nothing(empty, complete))
        sys.exit(0 if complete else 1)
    rates = Rates()
    for now in ticks(interval, count):
        show(with_rates(rates, now, look(nodes, only, path)[0]), output, (*_COLUMNS, "bytes_per_s"))
