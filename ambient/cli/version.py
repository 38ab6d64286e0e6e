"""`ambient version`."""

from __future__ import annotations

import platform
from importlib.metadata import version as package_version

import click

from ambient.cli.output import emit, output_option


@click.command()
@output_option
def version(output: str) -> None:
    """Show the versions of this program and of the kernel.

    \b
    Example:
      ambient version -o json
    """
    rows = [{"component": "ambient", "version": package_version("ambient")}]
    rows += [{"component": "kernel", "version": platform.release()}]
    rows += [{"component": "python", "version": platform.python_version()}]
    emit(rows, output, ("component", "version"))
