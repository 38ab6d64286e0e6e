"""`ambient version`."""

from __future__ import annotations

import platform
from importlib.metadata import version as package_version

import click

from ambient.cli.output import emit, output_option
from ambient.datapath.layout import LAYOUT


@click.command()
@output_option
def version(output: str) -> None:
    """Show the versions of this program, of its layout of the kernel maps, and of the kernel.

    \b
    Example:
      ambient version -o json
    """
    rows = [{"component": "ambient", "version": package_version("ambient")}]
    rows += [{"component": "layout", "version": LAYOUT.version}]
    rows += [{"component": "kernel", "version": platform.release()}]
    rows += [{"component": "python", "version": platform.python_version()}]
    emit(rows, output, ("component", "version"))
