"""`ambient control` and `ambient node`: the long-running processes, in the foreground."""

from __future__ import annotations

import os
import sys

import click


def _become(module: str, config: str) -> None:
    """Replace this process: the program runs with no trace of the command line's imports in memory."""
    os.execv(sys.executable, [sys.executable, "-m", module, "--config", config])


@click.command()
@click.option("--config", required=True, type=click.Path(exists=True, dir_okay=False), help="ControlSettings (YAML).")
def control(config: str) -> None:
    """Run the control plane: watch the Kubernetes API, serve discovery and certificates.

    \b
    Example:
      ambient control --config /etc/ambient/control.yaml
    """
    _become("ambient.io.run_control", config)


@click.command()
@click.option("--config", required=True, type=click.Path(exists=True, dir_okay=False), help="NodeSettings (YAML).")
def node(config: str) -> None:
    """Run the node: the holder, which starts and restarts the agent and ztunnel.

    \b
    Example:
      ambient node --config /etc/ambient/node.yaml
    """
    _become("ambient.node.holder", config)
