"""The tables of bpf/README.md and ARCHITECTURE.md name the hooks and maps there are, and the loader its files."""

from __future__ import annotations

import re
from pathlib import Path

from ambient.datapath.describe import MAP_PURPOSE
from ambient.io.bpf_links import HOOKS
from ambient.io.bpf_load import SOURCES
from ambient.io.bpf_maps import SPEC

ROOT = Path(__file__).resolve().parents[2]


def first_cells(text: str, title: str) -> set[str]:
    """Names in backquotes in the first column of the table under a heading."""
    section = text.partition(f"## {title}\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")]
    return {name for cell in rows for name in re.findall(r"`(\w+)`", cell)}


def test_the_readme_lists_every_hook_and_no_other():
    text = (ROOT / "bpf/README.md").read_text()
    assert first_cells(text, "Hooks") == {hook.name for hook in HOOKS}


def test_the_readme_lists_every_map_and_no_other():
    text = (ROOT / "bpf/README.md").read_text()
    assert first_cells(text, "Maps") == set(SPEC) == set(MAP_PURPOSE)


def test_the_loader_knows_every_source_file():
    assert {path.stem for path in (ROOT / "bpf").glob("*.c")} == set(SOURCES)


def test_every_map_is_declared_with_its_reasons():
    text = (ROOT / "bpf/include/maps.h").read_text()
    for name in SPEC:
        assert re.search(rf"/\* {name}: ", text), f"maps.h says nothing on {name}"


def test_the_architecture_names_every_map():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    assert all(f"`{name}`" in text for name in SPEC)
