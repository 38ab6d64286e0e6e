"""What ztunnel knows and does: workloads, services, policies, certificates, connections, log level.

Columns are those of `istioctl ztunnel-config`. Each node's ztunnel is asked; the World is the same on all of
them, so its objects are shown once unless ``--node`` names one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ambient.cli.output import emit, nothing, output_option
from ambient.cli.target import Target, find_nodes, from_each, target_options
from ambient.errors import PlatformFault
from ambient.io.admin_client import ask, ask_json
from ambient.settings import NodeSettings

Row = dict[str, Any]

LEVELS = ("trace", "debug", "info", "warn", "warning", "error", "off")
_namespace = click.option("-n", "--namespace", help="Only this namespace.")


def _socket(node: NodeSettings) -> Path:
    return Path(node.run_dir) / "ztunnel.sock"


def _dump(target: Target) -> dict[str, Any]:
    """The configuration dump of the first node that answers."""
    last: PlatformFault | None = None
    for node in find_nodes(target):
        try:
            found: dict[str, Any] = ask_json(_socket(node), "/config_dump")
            return found
        except PlatformFault as fault:
            last = fault
    raise last or PlatformFault("no node to ask")


def _within(rows: list[Row], namespace: str | None) -> list[Row]:
    return [row for row in rows if namespace is None or row["namespace"] == namespace]


@click.command()
@_namespace
@target_options
@output_option
def workloads(namespace: str | None, target: Target, output: str) -> None:
    """Show the workloads ztunnel knows and how each is reached.

    \b
    Example:
      ambient workloads
      ambient workloads -n shop -o json
    """
    rows = [
        {
            "namespace": w["namespace"],
            "pod_name": w["name"],
            "address": w["workloadIps"],
            "node": w["node"],
            "waypoint": (w.get("waypoint") or {}).get("destination", "None"),
            "protocol": w["protocol"],
            "service_account": w["serviceAccount"],
            "status": w["status"],
            "uid": w["uid"],
            "policies": w["authorizationPolicies"],
        }
        for w in _dump(target)["workloads"]
    ]
    rows.sort(key=lambda row: (row["namespace"], row["pod_name"]))
    emit(_within(rows, namespace), output, ("namespace", "pod_name", "address", "node", "waypoint", "protocol"))


@click.command()
@_namespace
@target_options
@output_option
def services(namespace: str | None, target: Target, output: str) -> None:
    """Show the services ztunnel knows and how many of their endpoints are healthy.

    \b
    Example:
      ambient services -n shop
    """
    rows = []
    for s in _dump(target)["services"]:
        ends = list(s["endpoints"].values())
        healthy = sum(e["status"] == "Healthy" for e in ends)
        rows.append(
            {
                "namespace": s["namespace"],
                "service_name": s["name"],
                "service_vip": [vip.partition("/")[2] for vip in s["vips"]],
                "waypoint": (s.get("waypoint") or {}).get("destination", "None"),
                "endpoints": f"{healthy}/{len(ends)}",
                "ports": s["ports"],
                "hostname": s["hostname"],
            }
        )
    rows.sort(key=lambda row: (row["namespace"], row["service_name"]))
    emit(_within(rows, namespace), output, ("namespace", "service_name", "service_vip", "waypoint", "endpoints"))


@click.command()
@_namespace
@target_options
@output_option
def policies(namespace: str | None, target: Target, output: str) -> None:
    """Show the L4 policies ztunnel enforces.

    \b
    Example:
      ambient policies
    """
    rows = [
        {
            "namespace": p["namespace"],
            "policy_name": p["name"],
            "action": p["action"],
            "scope": p["scope"],
            "dry_run": p["dryRun"],
            "groups": p["groups"],
        }
        for p in _dump(target)["policies"]
    ]
    rows.sort(key=lambda row: (row["namespace"], row["policy_name"]))
    emit(_within(rows, namespace), output, ("namespace", "policy_name", "action", "scope"))


@click.command()
@target_options
@output_option
def certificates(target: Target, output: str) -> None:
    """Show the certificates each ztunnel holds: leaf and root of every identity of its node.

    \b
    Example:
      ambient certificates --node node1
    """
    found, complete = from_each(find_nodes(target), lambda node: ask_json(_socket(node), "/certificates"))
    rows = [row for node, held in found for one in held for row in certificate_rows(node, one)]
    columns = ("certificate_name", "type", "status", "valid_cert", "serial_number", "not_after", "not_before")
    emit(rows, output, ("node", *columns), empty=nothing("no certificate is held", complete))
    sys.exit(0 if complete else 1)


def certificate_rows(node: str, found: dict[str, Any]) -> list[Row]:
    """A row for the leaf and one for each root; one without a serial number where there is no certificate."""
    head = {"node": node, "certificate_name": found["identity"], "status": found["state"]}
    parts = [("Leaf", c) for c in found["certChain"][:1]] + [("Root", c) for c in found["rootCerts"]]
    if not parts:
        return [{**head, "type": "Leaf", "valid_cert": False}]
    return [
        {
            **head,
            "type": kind,
            "valid_cert": found["state"] == "Available",
            "serial_number": c["serialNumber"],
            "not_after": c["expirationTime"],
            "not_before": c["validFrom"],
            "pem": c["pem"],
        }
        for kind, c in parts
    ]


@click.command()
@click.option("--direction", type=click.Choice(["inbound", "outbound"]), help="Only this direction.")
@target_options
@output_option
def connections(direction: str | None, target: Target, output: str) -> None:
    """Show the connections open through each ztunnel.

    \b
    Example:
      ambient connections --direction outbound
    """
    found, complete = from_each(find_nodes(target), lambda node: ask_json(_socket(node), "/connections"))
    rows = [
        {"node": node, **{_snake(name): value for name, value in c.items()}}
        for node, held in found
        for c in held["connections"]
        if direction is None or c["direction"].lower() == direction
    ]
    columns = ("node", "workload", "direction", "local", "remote", "remote_target", "protocol")
    emit(rows, output, columns, empty=nothing("no connection is open", complete))
    sys.exit(0 if complete else 1)


def _snake(name: str) -> str:
    """``remoteTarget`` -> ``remote_target``: fields are spelled alike in all commands."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name)


@click.command()
@click.option("--level", type=click.Choice(LEVELS), help="Set this level.")
@target_options
@output_option
def log(level: str | None, target: Target, output: str) -> None:
    """Show ztunnel's log level, or set it.

    \b
    Example:
      ambient log
      ambient log --level debug --node node1
    """
    said, complete = from_each(
        find_nodes(target),
        lambda node: ask(_socket(node), f"/logging?level={level}", "POST") if level else ask(_socket(node), "/logging"),
    )
    rows = [{"node": node, "level": text.strip().rpartition(" ")[2]} for node, text in said]
    emit(rows, output, ("node", "level"), empty="no ztunnel answered")
    sys.exit(0 if complete else 1)
