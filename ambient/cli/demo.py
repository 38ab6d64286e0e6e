"""`ambient demo`: the whole mesh on this machine, step by step, each step checked and not only shown.

The demo drives the same commands a user types (`ambient lab`, `kubectl`, `ambient maps`) and judges by what it can
see from outside: answers of the shop, packets on the underlay, process IDs, log lines. The first step that is not
as said ends it with exit code 1; the lab is removed in any case, unless ``--keep`` says otherwise.
"""

from __future__ import annotations

import os
import sys

import click

from ambient.errors import ConfigFault
from ambient.lab.demo import Demo, StepFailed


@click.command()
@click.option("--keep", is_flag=True, help="Leave the lab running at the end, to look around.")
@click.option("--name", default="demo", show_default=True, help="Name of the lab.")
def demo(keep: bool, name: str) -> None:
    """Two nodes and a shop: enrol, encrypt, authorize, un-enrol. About a minute; exit 1 if a step is not as said.

    \b
    Example:
      ambient demo
    """
    if os.geteuid() != 0:
        raise ConfigFault("user", os.geteuid(), "the demo makes a lab: run as root")
    run = Demo(name)
    try:
        run.all()
    except StepFailed as failure:
        click.secho(f"  × {failure}", fg="red", err=True)
        run.explain()
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if keep:
            click.echo(f"the lab stays: ambient lab status --name {name}; end it with ambient lab down --name {name}")
        else:
            run.down()
