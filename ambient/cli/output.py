"""How every command prints: a table for people, JSON or YAML for programs, from the same rows."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click
import yaml
from rich.console import Console
from rich.table import Table

_F = TypeVar("_F", bound=Callable[..., Any])

Row = Mapping[str, Any]


def output_option(function: _F) -> _F:
    """The ``-o`` option, spelled alike everywhere."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(["table", "json", "yaml"]),
        default="table",
        show_default=True,
        help="Format of the output.",
    )(function)


class Group(click.Group):
    """A group whose help shows what each command does in a whole sentence."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, self.commands[name].get_short_help_str(limit=200)) for name in self.list_commands(ctx)]
            )


def cell(value: Any) -> str:
    """Text of one table cell; nothing is shown as ``-`` so that columns can be cut by position."""
    if value is None or value in ("", [], ()):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple | set | frozenset):
        return ",".join(map(str, value))
    return str(value)


def age_text(seconds: float) -> str:
    """``5.7s``, ``2m03s``, ``3h05m``, ``4d06h``."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    for limit, large, small, unit in ((3600, 60, 1, "ms"), (86400, 3600, 60, "hm"), (float("inf"), 86400, 3600, "dh")):
        if seconds < limit:
            whole, rest = divmod(int(seconds), large)
            return f"{whole}{unit[0]}{rest // small:02d}{unit[1]}"
    return str(seconds)


def _heading(column: str) -> str:
    if column == "age_s":
        return "AGE"
    if column == "per_s":
        return "PER SECOND"
    text = f"{column.removesuffix('_per_s')}/s" if column.endswith("_per_s") else column
    return text.replace("_", " ").upper()


def _cell_of(row: Row, column: str) -> str:
    value = row.get(column)
    return age_text(value) if column == "age_s" and isinstance(value, int | float) else cell(value)


def table(rows: Sequence[Row], columns: Sequence[str], width: int | None = None) -> str:
    """A kubectl-like table: upper-case headings, no lines, one row each."""
    grid = Table(box=None, pad_edge=False, show_edge=False, header_style="")
    for column in columns:
        grid.add_column(_heading(column), no_wrap=True, overflow="fold")
    for row in rows:
        grid.add_row(*(_cell_of(row, column) for column in columns))
    out = io.StringIO()
    Console(file=out, width=width or 400, color_system=None, highlight=False, markup=False, emoji=False).print(grid)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def emit_object(found: Mapping[str, Any], output: str) -> None:
    """Print one object as JSON or YAML, for what is no list of rows."""
    text = json.dumps(found, indent=2, default=str)
    click.echo(text if output == "json" else yaml.safe_dump(json.loads(text), sort_keys=False).rstrip())


def nothing(text: str, complete: bool) -> str:
    """What to say of no rows."""
    return text if complete else f"{text}, as far as could be looked at"


def emit(rows: Sequence[Row], output: str, columns: Sequence[str], empty: str = "nothing found") -> None:
    """Print the rows. JSON and YAML always hold every field, the table only ``columns``."""
    if output == "json":
        click.echo(json.dumps([dict(row) for row in rows], indent=2, default=str))
    elif output == "yaml":
        click.echo(
            yaml.safe_dump(json.loads(json.dumps([dict(r) for r in rows], default=str)), sort_keys=False), nl=False
        )
    elif rows:
        click.echo(table(rows, columns))
    else:
        click.echo(empty, err=True)
    if sys.stdout is not None:
        sys.stdout.flush()
