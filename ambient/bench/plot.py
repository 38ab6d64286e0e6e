"""A run as one SVG: for each work the paths' medians relative to no mesh, with their spread. Pure, no library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

from ambient.bench.plan import PATHS, WORKS

Row = Mapping[str, Any]
_COLOURS: Final = {
    "none_same": "#9aa0a6",
    "mesh_redirect": "#1a73e8",
    "mesh_direct": "#5aa9f8",
    "mesh_off": "#7e57c2",
    "none_across": "#bdc1c6",
    "mesh_across": "#0b8043",
    "envoy_across": "#e8710a",
}
_WIDTH, _LABEL, _BAR, _GAP = 900, 250, 14, 22
_NOTE = 130


def svg(title: str, rows: Sequence[Row]) -> str:
    """Bars of ``ratio`` (1 is no mesh), the first metric of each work; a work nobody measured is left out."""
    groups: list[tuple[str, list[Row]]] = []
    for work in WORKS:
        metric = work.metrics[0]
        found = [r for r in rows if r["work"] == work.name and r["metric"] == metric.key and r["ratio"] is not None]
        if found:
            word = "lower" if metric.lower else "higher"
            groups.append((f"{work.title}, {metric.unit} ({word} is better)", found))
    longest = max((float(r["ratio"]) for _, found in groups for r in found), default=1.0)
    scale = (_WIDTH - _LABEL - _NOTE) / max(longest, 1.0)
    titles = {path.name: path.title for path in PATHS}
    parts: list[str] = []
    y = 48
    for heading, found in groups:
        parts.append(f'<text x="8" y="{y}" font-weight="bold">{escape(heading)}</text>')
        top = y + 6
        y += 6
        for row in found:
            name = str(row["path"])
            width = max(1.0, float(row["ratio"]) * scale)
            y += _BAR + 4
            parts.append(
                f'<text x="{_LABEL - 6}" y="{y - 3}" text-anchor="end">{escape(titles.get(name, name))}</text>'
                f'<rect x="{_LABEL}" y="{y - _BAR}" width="{width:.1f}" height="{_BAR}" '
                f'fill="{_COLOURS.get(name, "#888")}"/>'
                f'<text x="{_LABEL + width + 5:.1f}" y="{y - 3}">{row["ratio"]:.2f} ({row["median"]:g})</text>'
            )
        one = _LABEL + scale
        parts.append(
            f'<line x1="{one:.1f}" y1="{top}" x2="{one:.1f}" y2="{y + 3}" stroke="#d93025" stroke-dasharray="3"/>'
        )
        y += _GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y}" viewBox="0 0 {_WIDTH} {y}" '
        'font-family="sans-serif" font-size="11">\n'
        f'<rect width="{_WIDTH}" height="{y}" fill="#ffffff"/>\n'
        f'<text x="8" y="20" font-size="14" font-weight="bold">{escape(title)}</text>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )
