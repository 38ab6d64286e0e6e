"""What the documents say is what the code does."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from ambient import ports
from ambient.cli import cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "bpf/README.md", "tests/README.md", "kind-cluster/README.md")
AREAS = ("ambient", "ztunnel", "waypoint", "bpf", "examples", "kind-cluster", "tests")
FILES = [str(path) for area in AREAS for path in (ROOT / area).rglob("*")] + [str(path) for path in ROOT.glob("*")]
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


def code(document: str) -> list[str]:
    """What a document has in backquotes, and the lines of its blocks that are typed into a shell."""
    text = (ROOT / document).read_text()
    blocks = "".join(re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    typed = [line.partition("#")[0].removeprefix("$").strip() for line in blocks.splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [*typed, *re.findall(r"`([^`\n]+)`", prose)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_calls_only_commands_and_options_that_exist(document: str) -> None:
    names = {path[0] for path, _ in ALL}
    for words in (line.split() for line in code(document) if line.startswith("ambient ")):
        assert words[1] in names, " ".join(words)
        _parses(words[1:])


def test_the_readme_shows_commands() -> None:
    assert sum(line.startswith("ambient ") for line in code("README.md")) > 10


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_names_make_targets_that_exist(document: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in code(document):
        if line.startswith("make "):
            assert re.search(rf"^{re.escape(line.split()[1])}:", makefile, re.MULTILINE), line


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_names_files_that_exist(document: str) -> None:
    """A name counts if a file's path ends with it: `agent.py`, `net/test_rights.py`, `bpf/README.md`."""
    for name in code(document):
        if re.fullmatch(r"[\w./-]+\.(py|c|h|md|sh|yaml|toml|svg)", name):
            assert any(path.endswith(f"/{name}") for path in FILES), name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_link_leads_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / document).read_text()):
        name, _, anchor = target.partition("#")
        file = (ROOT / document).parent / name if name else ROOT / document
        assert file.exists(), target
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
        slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, target


def test_tests_that_a_text_refers_to_exist() -> None:
    names = {path.rpartition("/")[2] for path in FILES}
    for path in (path for path in FILES if path.endswith((".py", ".c", ".h", ".toml", "Makefile"))):
        for name in re.findall(r"\btest_\w+\.py\b", Path(path).read_text()):
            assert name in names, f"{path} refers to {name}"


def test_every_proof_is_listed_with_the_tests() -> None:
    listed = set(code("tests/README.md"))
    for path in (path for area in ("proof", "net") for path in (ROOT / "tests" / area).glob("test_*.py")):
        assert f"{path.parent.name}/{path.name}" in listed


def test_make_runs_the_tests_that_are_asked_for_and_no_others() -> None:
    command = ["make", "-n", "test", "ARGS=tests/model -x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if "-m pytest" in line)
    assert line.endswith("-m pytest tests/model -x")


COSTS = (
    ("1 B round trip: time (p50)", "rtt_1", "p50_us"),
    ("1 KB writes: throughput", "stream_1k", "gbit_s"),
    ("128 KB writes: throughput", "stream_128k", "gbit_s"),
    ("new connections: per second", "connect", "per_s"),
    ("HTTP, 1 connection: time (p50)", "http_1", "p50_us"),
    ("HTTP, 32 connections: requests per second", "http_32", "per_s"),
    ("the same, level-triggered server", "http_32_level", "per_s"),
    ("CPU per request of that", "http_32_level", "cpu_us"),
)
COST_PATHS = ("mesh_direct", "mesh_redirect", "mesh_across", "envoy_across")


def test_the_table_of_costs_is_that_of_the_runs_it_names() -> None:
    idle = re.search(r"`(tests/bench/results/\S+-full)\.json` and `-full-awake\.json`", README)
    assert idle
    runs = [json.loads((ROOT / f"{idle[1]}{word}.json").read_text())["rows"] for word in ("", "-awake")]
    ratios = [{(row["work"], row["path"], row["metric"]): row["ratio"] for row in rows} for rows in runs]
    for title, work, metric in COSTS:
        cells = [" / ".join(f"{run[work, path, metric]:.2f}" for run in ratios) for path in COST_PATHS]
        assert f"| {title} | {' | '.join(cells)} |" in README.splitlines()


def test_every_file_of_a_nodes_run_directory_is_listed() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text().partition("## Files and sockets")[2].partition("\n## ")[0]
    sources = "".join(path.read_text() for area in ("ambient", "ztunnel") for path in (ROOT / area).rglob("*.py"))
    made = set(re.findall(r"run_dir\)? / f?\"(\w[\w.]+)\"", sources))
    assert made == set(re.findall(r"`([\w.]+\.(?:sock|json|lock|pid))`", text))


def test_ports_are_the_same_in_python_and_c() -> None:
    for name, constant in (
        ("PORT_OUTBOUND", ports.OUTBOUND),
        ("PORT_INBOUND_PLAINTEXT", ports.INBOUND_PLAINTEXT),
        ("PORT_HBONE", ports.HBONE),
        ("PORT_DNS", ports.DNS),
    ):
        match = re.search(rf"#define {name} (\d+)", LAYOUT)
        assert match and int(match[1]) == constant


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
