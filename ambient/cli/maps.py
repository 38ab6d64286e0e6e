"""`ambient maps`: what the kernel holds right now, read from the pinned maps themselves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ambient.cli.output import emit, output_option
from ambient.cli.target import Target, find_nodes, target_options
from ambient.datapath import render
from ambient.datapath.describe import MAP_PURPOSE
from ambient.errors import ConfigFault
from ambient.io.bpf_maps import SPEC, Maps
from ambient.settings import NodeSettings

Row = dict[str, Any]

_ROWS: dict[str, Callable[[Maps, render.Names], list[Row]]] = {
    "enrolled": lambda m, n: render.enrolled(m.enrolled.items(), n),
    "workloads": lambda m, n: render.workloads(m.workloads.items(), n),
    "services": lambda m, n: render.services(m.services.items(), n),
    "redirects": lambda m, n: render.redirects(m.redirects.items(), n, time.monotonic_ns()),
    "authorized": lambda m, n: render.authorized(m.authorized.items(), n, time.monotonic_ns()),
    "origins": lambda m, n: render.origins(m.origins.items(), n),
    "endpoints": lambda m, n: render.endpoints(m.endpoints.items(), n),
    "verdicts": lambda m, n: render.verdicts(m.verdicts.items(), n),
    "flows": lambda m, n: render.flows(m.flows.items(), n, time.monotonic_ns()),
    "sockets": lambda m, n: render.sockets(m.sockets.items(), n),
    "listeners": lambda m, n: render.listeners(m.listeners.items(), n),
    "counters": lambda m, _: render.counters(m.counters()),
    "settings": lambda m, _: render.settings(m.settings, time.monotonic_ns()),
}
_NOT_LISTABLE = {
    "pending": "lives in sockets and cannot be listed",
    "events": "is a ring buffer that is consumed, not listed",
}
_NOT_IN_TABLE = {
    "redirects": ("cookie",),
    "authorized": ("generation",),
    "listeners": ("socket_cookie",),
    "flows": ("generation",),
}


def read_names(settings: NodeSettings, maps: Maps) -> render.Names:
    """Names of the node-local numbers, which the agent keeps in names.json, and of the addresses they have now.

    Without the file, numbers stay numbers.
    """
    try:
        raw = json.loads((Path(settings.run_dir) / "names.json").read_text())
        workloads = {int(number): render.short_workload(str(uid)) for number, uid in raw.get("workloads", {}).items()}
        services = {int(number): render.short_service(str(key)) for number, key in raw.get("services", {}).items()}
        identities = {int(number): str(name) for number, name in raw.get("identities", {}).items()}
        policies = {int(number): str(name) for number, name in raw.get("policies", {}).items()}
    except (OSError, ValueError, AttributeError):
        return render.Names()
    addresses = {address: workloads.get(value.workload, "") for address, value in maps.workloads.items()}
    addresses |= {key.vip: services.get(value.service, "") for key, value in maps.services.items()}
    return render.Names(workloads, services, addresses, identities, policies)


def overview(settings: NodeSettings) -> list[Row]:
    """One row per map: how full it is and what it is for."""
    with Maps.open(settings.bpffs_dir) as maps:
        rows = []
        for name in SPEC:
            table = maps.tables.get(name)
            entries: int | None = None
            if name in ("counters", "settings"):
                entries = (
                    len(_ROWS[name](maps, render.Names())) if name == "counters" else int(maps.settings is not None)
                )
            elif table is not None and name != "events":
                entries = len(table.list_keys())
            limit = table.info.max_entries if table is not None else None
            rows.append(
                {
                    "node": settings.node_name,
                    "name": name,
                    "entries": entries,
                    "limit": limit,
                    "what": MAP_PURPOSE[name],
                }
            )
        return rows


def raw_rows(settings: NodeSettings, name: str) -> list[Row]:
    with Maps.open(settings.bpffs_dir) as maps:
        table = maps.tables[name]
        found = []
        for key in table.list_keys():
            value = table.lookup(key)
            if value is not None:
                found.append({"node": settings.node_name, "key": key.hex(), "value": value.hex()})
        return found


@click.command()
@click.argument("name", required=False)
@click.option("--raw", is_flag=True, help="Keys and values as hexadecimal bytes.")
@target_options
@output_option
def maps(name: str | None, raw: bool, target: Target, output: str) -> None:
    """List every kernel map, or show the entries of one: redirects, workloads, enrolled, ...

    \b
    Example:
      ambient maps
      ambient maps redirects --node node1
      ambient maps workloads -o json
    """
    nodes = find_nodes(target)
    if name is None:
        emit([row for node in nodes for row in overview(node)], output, ("node", "name", "entries", "limit", "what"))
        return
    if name not in _ROWS:
        rule = _NOT_LISTABLE.get(name, f"is none of {', '.join(_ROWS)}")
        raise ConfigFault("map", name, rule)
    rows: list[Row] = []
    for node in nodes:
        if raw and name not in ("counters", "settings"):
            rows += raw_rows(node, name)
        else:
            with Maps.open(node.bpffs_dir) as opened:
                rows += [{"node": node.node_name, **row} for row in _ROWS[name](opened, read_names(node, opened))]
    hidden = _NOT_IN_TABLE.get(name, ())
    columns = [column for column in (rows[0] if rows else ()) if column not in hidden]
    emit(rows, output, columns, empty=f"{name} is empty")
