"""`ambient maps`: what the kernel holds right now, read from the pinned maps themselves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from ambient.cli.filters import Filter, filter_options
from ambient.cli.output import emit, output_option
from ambient.cli.target import Target, find_nodes, target_options
from ambient.cli.watch import Rates, show, ticks, watch_options
from ambient.datapath import render
from ambient.datapath.describe import MAP_PURPOSE
from ambient.errors import Misuse
from ambient.io import cgroup
from ambient.io.bpf_maps import SPEC, Maps
from ambient.settings import NodeSettings

Row = dict[str, Any]


def _with_paths(rows: list[Row]) -> list[Row]:
    """Cgroups by where they are, those that are gone by their number."""
    return [
        {**row, "value": tuple(str(cgroup.path_of_id(ident) or ident) for ident in row["value"])}
        if row["setting"] in ("exempt_cgroups", "kubelet_cgroups")
        else row
        for row in rows
    ]


_ROWS: dict[str, Callable[[Maps, render.Names], list[Row]]] = {
    "enrolled": lambda m, n: render.enrolled(m.enrolled.items(), n),
    "workloads": lambda m, n: render.workloads(m.workloads.items(), n),
    "services": lambda m, n: render.services(m.services.items(), n),
    "redirects": lambda m, n: render.redirects(m.redirects.items(), n, time.monotonic_ns()),
    "authorized": lambda m, n: render.authorized(m.authorized.items(), n, time.monotonic_ns()),
    "origins": lambda m, n: render.origins(m.origins.items(), n),
    "endpoints": lambda m, n: render.endpoints(m.endpoints.items(), n),
    "verdicts": lambda m, n: render.verdicts(
        m.verdicts.items(), n, {value.workload: value.generation for _, value in m.workloads.items()}
    ),
    "flows": lambda m, n: render.flows(m.flows.items(), n, time.monotonic_ns()),
    "sockets": lambda m, n: render.sockets(m.sockets.items(), n),
    "listeners": lambda m, n: render.listeners(m.listeners.items(), n),
    "counters": lambda m, _: render.counters(m.counters()),
    "settings": lambda m, _: _with_paths(render.settings(m.settings, time.monotonic_ns())),
}
_NOT_LISTABLE = {
    "pending": "lives in sockets and cannot be listed",
    "hashed": "lives in sockets and cannot be listed",
    "events": "is a ring buffer that is consumed, not listed",
}
_NOT_IN_TABLE = {
    "workloads": ("generation",),
    "verdicts": ("generation",),
    "redirects": ("cookie",),
    "authorized": ("generation",),
    "listeners": ("socket_cookie",),
    "sockets": ("socket_cookie",),
    "flows": ("generation", "service"),
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


def overview(settings: NodeSettings, opened: Maps | None = None) -> list[Row]:
    """One row per map: how full it is and what it is for."""
    with nullcontext(opened) if opened is not None else Maps.open(settings.bpffs_dir) as maps:
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


def watch_maps(nodes: tuple[NodeSettings, ...], interval: float, count: int | None, output: str) -> None:
    """All maps: entries that came and went per second, events per second for counters."""
    rates = Rates()
    for now in ticks(interval, count):
        rows: list[Row] = []
        for node in nodes:
            with Maps.open(node.bpffs_dir) as opened:
                for row in overview(node, opened):
                    rows.append(_with_rates(rates, now, node.node_name, row, opened))
        show(rows, output, ("node", "name", "entries", "limit", "added_per_s", "removed_per_s", "events_per_s"))


def _with_rates(rates: Rates, now: float, node: str, row: Row, opened: Maps) -> Row:
    name = row["name"]
    added = removed = events = None
    if name == "counters":
        events = rates.number((node, name), now, sum(opened.counters().values()))
    elif row["entries"] is not None and name != "settings":
        added, removed = rates.entries((node, name), now, opened.tables[name].list_keys())
    return {**row, "added_per_s": added, "removed_per_s": removed, "events_per_s": events}


def watch_rows(
    nodes: tuple[NodeSettings, ...], name: str, only: Filter, interval: float, count: int | None, output: str
) -> None:
    """One map: its rows, those that are new marked, how many come and go per second, counters with their rate."""
    rates = Rates()
    before: set[str] | None = None
    for now in ticks(interval, count):
        rows = _rows_of(nodes, name, only)
        changes: Row = {}
        if name == "counters":
            rows = [{**r, "per_s": rates.number((r["node"], r["reason"]), now, r["count"])} for r in rows]
        else:
            identities = [_identity(row) for row in rows]
            rows = [
                {**row, "new": before is not None and identity not in before}
                for row, identity in zip(rows, identities, strict=True)
            ]
            before = set(identities)
            changes = dict(zip(("added_per_s", "removed_per_s"), rates.entries(name, now, before), strict=True))
        hidden = _NOT_IN_TABLE.get(name, ())
        columns = [column for column in (rows[0] if rows else ()) if column not in hidden]
        show(rows, output, sorted(columns, key=lambda column: column == "what"), changes)


def _identity(row: Row) -> str:
    """What of a row stays while its entry does."""
    return json.dumps({k: v for k, v in row.items() if k not in _MOVING}, default=str, sort_keys=True)


_MOVING = (
    "age_s",
    "flows",
    "refused",
    "state",
    "sent_native",
    "sent_redirected",
    "received_native",
    "received_redirected",
    "switches",
    "value",
)


def _rows_of(nodes: tuple[NodeSettings, ...], name: str, only: Filter) -> list[Row]:
    rows: list[Row] = []
    for node in nodes:
        with Maps.open(node.bpffs_dir) as opened:
            found = _ROWS[name](opened, read_names(node, opened))
        rows += [{"node": node.node_name, **row} for row in only.apply(found, name)]
    return rows


def _refuse_nonsense(name: str | None, raw: bool, only: Filter, watch: bool) -> None:
    """Raises Misuse for words that cannot be meant together."""
    if name is not None and name not in _ROWS:
        raise Misuse("map", name, _NOT_LISTABLE.get(name, f"is none of {', '.join(_ROWS)}"))
    if raw and (watch or only or name in (None, "counters", "settings")):
        raise Misuse("--raw", name or "maps", "shows all entries of a map that has keys, once, and knows no names")
    if only and name is None:
        raise Misuse("filter", "maps", "name a map to see rows of: ambient maps workloads --pod NAME")


@click.command()
@click.argument("name", required=False)
@click.option("--raw", is_flag=True, help="Keys and values as hexadecimal bytes.")
@filter_options
@watch_options
@target_options
@output_option
def maps(
    name: str | None,
    raw: bool,
    only: Filter,
    watch: bool,
    interval: float,
    count: int | None,
    target: Target,
    output: str,
) -> None:
    """List every kernel map, or show the entries of one: redirects, workloads, enrolled, ...

    \b
    Example:
      ambient maps
      ambient maps redirects --node node1
      ambient maps workloads --namespace shop -o json
      ambient maps counters --watch
    """
    _refuse_nonsense(name, raw, only, watch)
    nodes = find_nodes(target)
    if name is None and watch:
        watch_maps(nodes, interval, count, output)
        return
    if name is None:
        emit([row for node in nodes for row in overview(node)], output, ("node", "name", "entries", "limit", "what"))
        return
    if watch:
        watch_rows(nodes, name, only, interval, count, output)
        return
    rows = [row for node in nodes for row in raw_rows(node, name)] if raw else _rows_of(nodes, name, only)
    hidden = _NOT_IN_TABLE.get(name, ())
    columns = [column for column in (rows[0] if rows else ()) if column not in hidden]
    emit(rows, output, columns, empty=f"no entry of {name} matches {only}" if only else f"{name} is empty")
