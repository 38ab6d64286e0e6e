"""``python -m ztunnel --config FILE``: the node's layer 4 proxy. ``FILE`` holds NodeSettings (YAML)."""

from __future__ import annotations

import sys
from pathlib import Path

from ambient.errors import AmbientError
from ambient.settings import NodeSettings, read_settings


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 2 for misuse, 1 for what cannot be run."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 2 or arguments[0] != "--config":
        sys.stderr.write("usage: python -m ztunnel --config FILE\n")
        return 2
    try:
        settings = read_settings(NodeSettings, Path(arguments[1]).read_text(), arguments[1])
        from ztunnel.io.run import run_parent

        return run_parent(settings)
    except (OSError, ValueError, AmbientError) as error:
        sys.stderr.write(f"ztunnel: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
