"""A lab that runs from a copy of the programs, so that another version can be put in its place while it runs."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ambient.datapath.layout import parse
from tests.support.mesh import Mesh

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("ambient", "ztunnel", "waypoint", "bpf", "build")


class CopiedMesh(Mesh):
    """Everything of it, the command line too, is the copy's; the test process itself stays the original's."""

    def __init__(self, name: str, directory: Path, nodes: int = 1) -> None:
        super().__init__(name, nodes)
        self._directory = directory
        for part in PARTS:
            shutil.copytree(ROOT / part, directory / part, ignore=shutil.ignore_patterns("__pycache__"))

    @property
    def header(self) -> Path:
        return self._directory / "bpf/include/layout.h"

    @property
    def layout(self) -> str:
        """Name of the pin directory of the copy as it is now."""
        return parse(self.header.read_text()).version

    def change_layout(self) -> str:
        """The copy becomes another version of the programs; what runs stays as it is. Returns the layout's name."""
        text, count = re.subn(
            r"(#define LAYOUT_VERSION )(\d+)", lambda m: f"{m[1]}{int(m[2]) + 1}", self.header.read_text()
        )
        assert count == 1
        self.header.write_text(text)
        return self.layout

    def run(self, argv: Sequence[str], **options: object) -> str:  # type: ignore[override]
        if argv[0] == sys.executable:
            path = ["env", f"PYTHONPATH={self._directory}", "PYTHONSAFEPATH=1", f"PATH={os.environ['PATH']}"]
            argv = [*path, *argv]
        return super().run(argv, **options)  # type: ignore[arg-type]
