"""The command line. Nouns look, verbs change; tables for people, ``-o json|yaml`` for programs.

Data goes to stdout, talk to stderr. Exit codes: 0 done or yes, 1 no or failed, 2 misuse; `why` and `diff`, whose 1
is an answer, exit with 2 also when there is none, because a node did not say. A sub-command's
module is imported only when it is called, so that `ambient --help` stays fast and needs neither root nor bcc.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import Any

import click

from ambient.errors import AmbientError, Misuse

_COMMANDS: dict[str, tuple[str, str]] = {
    # name: (module:object, one line for the overview)
    "check": ("ambient.cli.check:check", "Can this machine run the mesh, and what is in the way?"),
    "status": ("ambient.cli.status:status", "Do agent, ztunnel and control plane work on each node?"),
    "lab": ("ambient.cli.lab:lab", "Nodes and pods on this machine, with an API server."),
    "demo": ("ambient.cli.demo:demo", "Two nodes and a shop: enrol, encrypt, deny, un-enrol, step by step."),
    "workloads": ("ambient.cli.state:workloads", "What ztunnel knows of workloads."),
    "services": ("ambient.cli.state:services", "What ztunnel knows of services."),
    "policies": ("ambient.cli.state:policies", "What ztunnel knows of policies."),
    "certificates": ("ambient.cli.state:certificates", "Certificates ztunnel holds."),
    "connections": ("ambient.cli.state:connections", "Connections open through ztunnel."),
    "maps": ("ambient.cli.maps:maps", "What the kernel holds right now."),
    "flows": ("ambient.cli.flows:flows", "Live connections, their path, bytes and age."),
    "why": ("ambient.cli.why:why", "What would happen to a connection, and why."),
    "diff": ("ambient.cli.operate:diff", "Does the kernel hold what it should? Repair it."),
    "bypass": ("ambient.cli.operate:bypass", "Switch capture off in the kernel, and on again."),
    "namespace": ("ambient.cli.namespace:namespace", "List, enrol and unenrol namespaces."),
    "bench": ("ambient.cli.bench:bench", "What the mesh costs here, beside no mesh and beside Envoy."),
    "log": ("ambient.cli.state:log", "Show or set ztunnel's log level."),
    "version": ("ambient.cli.version:version", "Versions of this program, its layout and the kernel."),
    "control": ("ambient.cli.processes:control", "Run the control plane."),
    "node": ("ambient.cli.processes:node", "Run the node: holder, agent and ztunnel."),
}


class _Lazy(click.Group):
    """Imports a sub-command's module when it is called; a fault becomes one line and exit code 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AmbientError as error:
            click.echo(f"ambient: {error}", err=True)
            sys.exit(2 if isinstance(error, Misuse) or ctx.invoked_subcommand in _ANSWERS else 1)


_ANSWERS = ("why", "diff")
"""Commands whose exit code 1 is an answer: that there is none has another."""


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="ambient", prog_name="ambient")
def cli() -> None:
    """ambient: a service mesh without sidecars. Label a namespace and its pods have identity, mTLS and policy.

    \b
    Example:
      ambient lab up -f examples/shop.yaml --nodes 2
      ambient namespace enrol shop
      ambient maps redirects

    Completion for bash: eval "$(_AMBIENT_COMPLETE=bash_source ambient)"
    """


def main() -> None:
    """Entry point of the `ambient` program."""
    try:
        cli(prog_name="ambient")
    except OSError as error:  # a reader that has gone is click's business
        click.echo(f"ambient: {error}", err=True)
        _forget_output()
        sys.exit(1)


def _forget_output() -> None:
    """What could not be written, and waits in a buffer, is not tried again at exit."""
    with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.__stdout__.fileno() if sys.__stdout__ is not None else 1)
