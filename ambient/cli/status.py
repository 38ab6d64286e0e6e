"""`ambient status`: does the mesh work on each node, and what do its parts complain of?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ambient.cli.output import emit, output_option
from ambient.cli.target import Target, find_nodes, target_options
from ambient.errors import PlatformFault
from ambient.io.admin_client import ask, ask_json
from ambient.settings import NodeSettings

Row = dict[str, Any]
AGENT_S = 4.0
"""How long a process may take to answer; one that does not is shown as silent."""
_COLUMNS = ("node", "agent", "ztunnel", "control", "mode", "pods", "enrolled", "problems")
SILENT = "no answer"


def status_row(node: str, said: Row | None, ztunnel: str) -> Row:
    """What an agent's /status (None: it does not answer) and ztunnel's /ready say, as one row."""
    if said is None:
        unknown: Row = {"control": "", "mode": "", "pods": None, "enrolled": None, "problems": []}
        return {"node": node, "agent": SILENT, "ztunnel": ztunnel, **unknown}
    pods, bypass, control = said["pods"], said["bypass"], said["control"]
    cut_off = [] if control["connected"] else [f"control plane: {control['reason']}"]
    excluded = [
        f"{p['namespace']}/{p['name']}: {p['state']}: {p['reason']}" + (f": {p['detail']}" if p["detail"] else "")
        for p in pods
        if p["reason"]
    ]
    return {
        "node": node,
        "agent": "ready" if said["ready"] else f"not ready: {said['reason']}",
        "ztunnel": ztunnel,
        "control": "connected" if control["connected"] else "not connected",
        "mode": "bypass"
        if bypass["node"]
        else f"bypass of {','.join(bypass['namespaces'])}"
        if bypass["namespaces"]
        else "capture",
        "pods": len(pods),
        "enrolled": sum(p["state"] == "enrolled" for p in pods),
        "problems": [*cut_off, *said["problems"], *excluded],
    }


def works(row: Row) -> bool:
    return (row["agent"], row["ztunnel"], row["control"]) == ("ready", "ready", "connected")


def _row(node: NodeSettings) -> Row:
    run, faults = Path(node.run_dir), []
    said: Row | None = None
    try:
        said = ask_json(run / "agent.sock", "/status", AGENT_S)
    except PlatformFault as fault:
        faults.append(str(fault))
    try:
        ask(run / "ztunnel.sock", "/ready", timeout_s=AGENT_S)
        ztunnel = "ready"
    except PlatformFault as fault:
        _, pending, what = str(fault).partition("not ready, ")
        ztunnel = f"not ready: {what}" if pending else SILENT
        faults += [] if pending else [str(fault)]
    row = status_row(node.node_name, said, ztunnel)
    return {**row, "problems": [*faults, *row["problems"]]}


@click.command()
@target_options
@output_option
def status(target: Target, output: str) -> None:
    """Show whether agent, ztunnel and control plane work for each node, how many pods are enrolled, and all problems.

    Problems are what the agent could not do as asked: pods that cannot be in the mesh, annotations it does not know,
    maps that are full. Exit code 1 if a part is not ready or does not answer; a problem alone is none. What the machine
    itself lacks says `ambient check`.

    \b
    Example:
      ambient status
      ambient status -o json | jq '.[].problems[]'
    """
    rows = [_row(node) for node in find_nodes(target)]
    if output == "table":
        emit([{**row, "problems": len(row["problems"])} for row in rows], output, _COLUMNS)
        for row in rows:
            for problem in row["problems"]:
                click.echo(f"{row['node']}: {problem}")
    else:
        emit(rows, output, ())
    sys.exit(0 if all(map(works, rows)) else 1)
