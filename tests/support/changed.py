"""The programs with lines changed: for tests that must fail without those lines, or that need small limits.

python -m tests.support.changed SOURCES ARGUMENTS...        ambient.io.bpf_load with these sources
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from ambient.datapath.layout import parse, source_directory
from ambient.io import bpf_load, bpf_maps

Change = tuple[str, str, str]
"""File below bpf/, a text that is in it exactly once, what stands there instead."""


def limit(name: str, entries: int) -> Change:
    """Another limit of a map: ``limit("FLOWS_MAX", 8)``."""
    layout = (source_directory() / "include/layout.h").read_text()
    line = next(line for line in layout.splitlines() if line.startswith(f"#define {name} "))
    return "include/layout.h", line, f"#define {name} {entries}"


def copy(target: Path, changes: Iterable[Change]) -> Path:
    """A copy of bpf/ with the changes made."""
    shutil.copytree(source_directory(), target)
    for name, old, new in changes:
        path = target / name
        text = path.read_text()
        assert text.count(old) == 1, f"{name}: {old!r} is there {text.count(old)} times"
        path.write_text(text.replace(old, new))
    return target


@contextlib.contextmanager
def limits_of(sources: Path | None) -> Iterator[None]:
    """Maps may be opened that have the limits of these sources."""
    before = dict(bpf_maps.SPEC)
    if sources is not None:
        layout = parse((sources / "include/layout.h").read_text())
        for name, (key, value, entries) in before.items():
            constant = f"{name.upper()}_MAX"
            bpf_maps.SPEC[name] = (key, value, layout[constant] if constant in layout.constants else entries)
    try:
        yield
    finally:
        bpf_maps.SPEC.update(before)


def main(arguments: list[str]) -> int:
    sources = Path(arguments[0])
    bpf_load.source_directory = lambda: sources
    with limits_of(sources):
        return bpf_load.main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
