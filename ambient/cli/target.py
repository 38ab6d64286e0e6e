"""Which nodes a command looks at: this machine's own, or the nodes of a lab that runs here.

A node is known by its NodeSettings file. Without ``--config`` the order is: the environment's AMBIENT_NODE_CONFIG,
/etc/ambient/node.yaml, and then the labs in /run/ambient-lab. Several labs at once must be told apart by ``--lab``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from ambient.errors import AmbientError, Misuse, PlatformFault
from ambient.settings import NodeSettings, read_settings

NODE_CONFIG = Path("/etc/ambient/node.yaml")
LABS = Path("/run/ambient-lab")

_F = TypeVar("_F", bound=Callable[..., Any])
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Target:
    """Where to look, as the user said it."""

    config: str | None
    lab: str | None
    node: str | None


def target_options(function: _F) -> _F:
    """``--node``, ``--lab`` and ``--config``, spelled alike everywhere; the command gets one `Target`."""

    def wrapped(*args: Any, config: str | None, lab: str | None, node: str | None, **rest: Any) -> Any:
        return function(*args, target=Target(config, lab, node), **rest)

    wrapped.__doc__, wrapped.__name__ = function.__doc__, function.__name__
    wrapped.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
    for option in (
        click.option("--node", help="Only this node."),
        click.option("--lab", help="Nodes of this lab; needed only if several run."),
        click.option("--config", help="NodeSettings file of the node."),
    ):
        option(wrapped)
    return wrapped  # type: ignore[return-value]


def find_nodes(target: Target, labs: Path = LABS, own: Path = NODE_CONFIG) -> tuple[NodeSettings, ...]:
    """The settings of the nodes asked for, by name. Raises PlatformFault or Misuse saying what to give."""
    nodes = [_read(path) for path in _files(target, labs, own)]
    if target.node is not None:
        found = tuple(node for node in nodes if node.node_name == target.node)
        if not found:
            names = ", ".join(node.node_name for node in nodes)
            raise Misuse("--node", target.node, f"is not one of {names}")
        return found
    return tuple(nodes)


def find_lab(name: str | None, labs: Path = LABS) -> str:
    """The lab's name; the only one that runs if none was given."""
    running = sorted(path.name for path in labs.glob("*") if path.is_dir())
    if name is not None:
        if name not in running:
            raise Misuse("--lab", name, f"no such lab runs here; running: {', '.join(running) or 'none'}")
        return name
    if not running:
        raise PlatformFault("no lab runs here: start one with `ambient lab up -f FILE`")
    if len(running) > 1:
        raise Misuse("--lab", "", f"several labs run here, name one of {', '.join(running)}")
    return running[0]


def _files(target: Target, labs: Path, own: Path) -> list[Path]:
    given = target.config or (None if target.lab else os.environ.get("AMBIENT_NODE_CONFIG"))
    if given:
        return [Path(given)]
    if target.lab is None and own.exists():
        return [own]
    if target.lab is None and not any(labs.glob("*/nodes/*/node.yaml")):
        raise PlatformFault(f"no node found: neither {own} nor a lab exists here; give --config FILE or start a lab")
    files = sorted((labs / find_lab(target.lab, labs) / "nodes").glob("*/node.yaml"))
    if not files:
        raise PlatformFault(f"lab {target.lab} has no node with a mesh (was it started with --no-mesh?)")
    return files


def _read(path: Path) -> NodeSettings:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "not text"
        step = "run as root" if isinstance(error, PermissionError) else "give the settings of a node as --config FILE"
        of = " (AMBIENT_NODE_CONFIG)" if str(path) == os.environ.get("AMBIENT_NODE_CONFIG") else ""
        raise PlatformFault(f"{path}{of}: {said}: {step}") from None
    return read_settings(NodeSettings, text, str(path))


def from_each(nodes: Sequence[NodeSettings], ask: Callable[[NodeSettings], _T]) -> tuple[list[tuple[str, _T]], bool]:
    """What each node answers, by name, and whether all did; who does not is said on stderr."""
    found: list[tuple[str, _T]] = []
    for node in nodes:
        try:
            found.append((node.node_name, ask(node)))
        except AmbientError as fault:
            click.echo(f"ambient: {node.node_name}: {fault}", err=True)
    return found, len(found) == len(nodes)
