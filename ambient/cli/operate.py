"""`ambient bypass` and `ambient diff`: what an operator asks of the agents, over their sockets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import click

from ambient.cli.output import Group, emit, output_option
from ambient.cli.target import Target, find_nodes, from_each, target_options
from ambient.datapath.drift import differing
from ambient.errors import Misuse
from ambient.io.admin_client import ask
from ambient.settings import NodeSettings

Row = dict[str, Any]
COMPARED = (
    "settings", "enrolled", "workloads", "services", "endpoints", "verdicts", "flows", "listeners", "sk_lookup"
)  # fmt: skip
"""What agents compare: maps that they alone write, flows that are let in by them, and sk_lookup in each pod."""
_namespace = click.option("-n", "--namespace", default="", help="Only pods of this namespace, not the whole node.")


def _agent(node: NodeSettings, method: str, path: str) -> Any:
    return json.loads(ask(Path(node.run_dir) / "agent.sock", path, method))


@click.group(cls=Group)
def bypass() -> None:
    """Switch capture off in the kernel, at once, and on again. For when the mesh itself is in the way.

    What is bypassed goes in plaintext and past every policy: new connections of the pods are left alone, and
    plaintext to them is not taken. Open connections stay as they are. It outlives restarts, until it is switched off.

    \b
    Example:
      ambient bypass on --namespace shop
      ambient bypass status
      ambient bypass off --namespace shop
    """


def _switch(on: bool, namespace: str, target: Target, output: str) -> None:
    query = urlencode({"on": int(on), "namespace": namespace})
    found, complete = from_each(find_nodes(target), lambda node: _agent(node, "POST", f"/bypass?{query}"))
    rows = [bypass_row(node, said) for node, said in found]
    emit(rows, output, _COLUMNS, empty="nothing was changed")
    sys.exit(0 if complete and all(row["applied"] for row in rows) else 1)


_COLUMNS = ("node", "mode", "namespaces", "pods", "applied")


def bypass_row(node: str, found: Row) -> Row:
    """``mode`` is bypass where nothing of the node is captured; ``pods`` those of bypassed namespaces."""
    return {
        "node": node,
        "mode": "bypass" if found["node"] else "capture",
        "namespaces": found["namespaces"],
        "pods": found["pods"],
        "applied": found["applied"],
    }


@bypass.command("on")
@_namespace
@target_options
@output_option
def bypass_on(namespace: str, target: Target, output: str) -> None:
    """Capture nothing any more: on every node found, on one (--node), or for one namespace.

    \b
    Example:
      ambient bypass on
      ambient bypass on --namespace shop --node node1
    """
    _switch(True, namespace, target, output)


@bypass.command("off")
@_namespace
@target_options
@output_option
def bypass_off(namespace: str, target: Target, output: str) -> None:
    """Capture again. Namespaces that were bypassed by name are switched back by name.

    \b
    Example:
      ambient bypass off
      ambient bypass off --namespace shop
    """
    _switch(False, namespace, target, output)


@bypass.command("status")
@target_options
@output_option
def bypass_status(target: Target, output: str) -> None:
    """Show what is bypassed. Exit code 1 if a node cannot be asked.

    \b
    Example:
      ambient bypass status -o json
    """
    found, complete = from_each(find_nodes(target), lambda node: _agent(node, "GET", "/bypass"))
    emit([bypass_row(node, said) for node, said in found], output, _COLUMNS, empty="no agent answered")
    sys.exit(0 if complete else 1)


@click.command()
@click.option("--repair", is_flag=True, help="Ask the agents to write what differs, then look again.")
@click.option("--map", "only", type=click.Choice(COMPARED), metavar="NAME", help="Only this map.")
@target_options
@output_option
def diff(repair: bool, only: str | None, target: Target, output: str) -> None:
    """Compare what the kernel holds with what it should hold. Exit code 1 if anything differs (or still does), 2 if an
    agent does not answer.

    The agents compute every entry anew from what the control plane told and from their own pods, and read the maps
    themselves. Pods that are just joining or leaving are left out. With --repair, ``left`` is what remains.

    \b
    Example:
      ambient diff
      ambient diff --repair --node node1
      ambient diff --map workloads -o json
    """
    if repair and only:
        raise Misuse("--map", only, "agents repair whatever differs: look at one map, or repair without --map")
    rows: list[Row] = []
    left = 0
    answers, complete = from_each(
        find_nodes(target),
        lambda node: _agent(node, "POST", "/repair") if repair else _agent(node, "GET", "/diff"),
    )
    for name_of_node, found in answers:
        remaining = {(r["map"], r["key"]) for r in found.get("left", found["drift"])}
        left += sum(only is None or name == only for name, _ in remaining)
        for row in found["drift"]:
            if only is None or row["map"] == only:
                repaired = repair and (row["map"], row["key"]) not in remaining
                rows.append({"node": name_of_node, **row, "repaired": repaired})
    if output == "table" and (rows or complete):
        shown = []
        for row in rows:
            wanted, actual = differing(row)
            shown.append({**row, "wanted": wanted, "actual": actual})
        columns = ("node", "map", "key", "name", "drift", "wanted", "actual", *(("repaired",) if repair else ()))
        emit(shown, output, columns, empty="the kernel holds what it should")
    elif output != "table":
        emit(rows, output, ())
    sys.exit((1 if left else 0) if complete else 2)
