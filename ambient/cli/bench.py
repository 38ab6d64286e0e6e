"""`ambient bench`: what the mesh costs on this machine, beside no mesh and beside Envoy."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import click

from ambient.bench import plan, plot
from ambient.bench.run import Run, record_name, results_directory
from ambient.cli.output import emit, emit_object, output_option
from ambient.errors import ConfigFault

_COLUMNS = ("work", "path", "metric", "median", "unit", "ratio", "better", "spread", "runs")


@click.command()
@click.option("--only", multiple=True, help="A path, a work or `memory`; may be given several times (see --list).")
@click.option("--list", "listing", is_flag=True, help="Show paths and works, measure nothing.")
@click.option("--quick", is_flag=True, help="One short round of few works: to see that it works, not how fast.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1, 50), help="Medians are of so many.")
@click.option("--seconds", default=2.0, show_default=True, type=click.FloatRange(0.05, 60), help="Of one measurement.")
@click.option("--awake", is_flag=True, help="Let no processor sleep, as on a busy node (processes of idle priority).")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write the whole result, as JSON.")
@click.option("--svg", type=click.Path(dir_okay=False, path_type=Path), help="Also draw it.")
@click.option("--record", is_flag=True, help="Keep result and drawing in tests/bench/results, named by day and commit.")
@output_option
def bench(
    only: tuple[str, ...],
    listing: bool,
    quick: bool,
    rounds: int,
    seconds: float,
    awake: bool,
    out: Path | None,
    svg: Path | None,
    record: bool,
    output: str,
) -> None:
    """Measure latency, throughput, connections, CPU and memory: no mesh, each path of the mesh, and an Envoy pair.

    Builds two labs (with and without a mesh), measures all paths in turn, and removes the labs. Everything runs on this
    machine, so only ratios within one run mean anything: `ratio` is to the same work without a mesh. About ten minutes.
    On an idle machine each message wakes a sleeping processor, which hides much of what its path costs: see --awake.
    Exit code 1 if something failed on the way; a target that is missed is a finding and no failure.

    \b
    Example:
      ambient bench
      ambient bench --awake --record
      ambient bench --only mesh_across --only http_32 --rounds 5 -o json
      ambient bench --quick
    """
    if listing:
        rows = [{"kind": "path", "name": p.name, "title": p.title} for p in plan.PATHS]
        rows += [{"kind": "work", "name": w.name, "title": w.title} for w in plan.WORKS]
        emit(rows, output, ("kind", "name", "title"))
        return
    selection = plan.select(only, quick)
    if os.geteuid() != 0:
        raise ConfigFault("user", os.geteuid(), "a benchmark makes labs: run as root")
    directory = results_directory() if record else None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    result = Run(selection, 1 if quick else rounds, 0.2 if quick else seconds, _talk, awake=awake).run()
    title = f"ambient bench, {result['at']}, commit {result['commit']}{', processors kept awake' if awake else ''}"
    drawing = plot.svg(title, result["rows"])
    files = [(out, svg)]
    if directory is not None:
        name = record_name(result, (("quick",) if quick else ()) + only, awake=awake)
        files.append((directory / f"{name}.json", directory / f"{name}.svg"))
    for data, picture in files:
        if data is not None:
            data.write_text(json.dumps(result, indent=1) + "\n")
        if picture is not None:
            picture.write_text(drawing)
    if output == "table":
        _print(result)
    else:
        emit_object(result, output)
    sys.exit(1 if result["failures"] else 0)


def _talk(line: str) -> None:
    click.echo(line, err=True)


def _print(result: dict[str, Any]) -> None:
    emit(result["rows"], "table", _COLUMNS, empty="nothing was measured")
    memory = [{"state": state, **row} for state, rows in result["memory"].items() for row in rows]
    if memory:
        click.echo("")
        emit(memory, "table", ("state", "node", "role", "rss_mb", "pss_mb"))
    if result["targets"]:
        click.echo("")
        emit(result["targets"], "table", ("target", "measured", "aim", "met"))
    for note in result["notes"] + result["failures"]:
        click.echo(f"note: {note}", err=True)
