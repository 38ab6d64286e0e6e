"""What the documents say is what the code does."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from ambient import ports
from ambient.cli import cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
LAYOUT = (ROOT / "bpf/include/layout.h").read_text()


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


ALL = list(commands(cli))


@pytest.mark.parametrize(("path", "command"), ALL, ids=[" ".join(path) for path, _ in ALL])
def test_every_command_has_help_with_an_example_that_parses(path: tuple[str, ...], command: click.Command) -> None:
    help_text = command.help or ""
    assert "Example:" in help_text, f"ambient {' '.join(path)} --help shows no example"
    lines = re.findall(r"ambient [a-z][^\n)]*", help_text.partition("Example:")[2])
    assert lines, f"the example of {' '.join(path)} calls something else"
    for line in lines:
        _parses(line.split()[1:])


def _parses(words: list[str]) -> None:
    """Walk the words down the command tree; the last command must accept the rest."""
    command: click.Command = cli
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(click.Context(command), words[0])
        if found is None:
            break
        command, words = found, words[1:]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word == "--":
            break
        if word.startswith("-") and len(word) > 1:
            assert word.partition("=")[0] in known, f"{command.name} has no option {word}"


def test_the_readme_calls_only_commands_that_exist() -> None:
    called = re.findall(r"\$ ambient ([a-z]+)(?: ([a-z]+))?", README)
    assert called
    paths = {path for path, _ in ALL}
    for name, sub in called:
        assert (name,) in paths
        if any(path[0] == name and len(path) == 2 for path in paths) and name != "maps":
            assert (name, sub) in paths


def test_the_readme_names_make_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z]+)`?", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_ports_are_the_same_in_python_and_c() -> None:
    for name, constant in (
        ("PORT_OUTBOUND", ports.OUTBOUND),
        ("PORT_INBOUND_PLAINTEXT", ports.INBOUND_PLAINTEXT),
        ("PORT_HBONE", ports.HBONE),
        ("PORT_DNS", ports.DNS),
    ):
        match = re.search(rf"#define {name} (\d+)", LAYOUT)
        assert match and int(match[1]) == constant


MAPS = (
    "enrolled",
    "workloads",
    "services",
    "pending",
    "hashed",
    "redirects",
    "authorized",
    "origins",
    "listeners",
    "counters",
    "settings",
)


@pytest.mark.parametrize("name", MAPS)
def test_every_map_is_described_where_maps_are_described(name: str) -> None:
    assert re.search(rf"\b{name}\b", (ROOT / "bpf/include/maps.h").read_text())
    assert f"`{name}`" in (ROOT / "bpf/README.md").read_text()
    assert f"`{name}`" in ARCHITECTURE


def test_only_the_loader_imports_bcc() -> None:
    importers = set()
    for path in [*ROOT.glob("ambient/**/*.py"), *ROOT.glob("ztunnel/**/*.py"), *ROOT.glob("waypoint/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "bcc" for name in names):
                importers.add(path.relative_to(ROOT).as_posix())
    assert importers <= {"ambient/io/bpf_load.py"}
    assert importers


def test_nothing_installs_what_pypi_calls_bcc() -> None:
    for name in ("requirements.lock", "pyproject.toml"):
        assert not re.search(r"^\s*\"?bcc\s*[=<>~]", (ROOT / name).read_text(), re.MULTILINE)
