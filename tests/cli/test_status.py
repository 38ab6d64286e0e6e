"""`ambient status`: one row for each node, all problems, and an exit code by the parts that do not work."""

from __future__ import annotations

import http.server
import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ambient.cli import cli
from ambient.cli.status import status_row, works

POD = {"namespace": "shop", "name": "a", "state": "enrolled", "reason": "", "detail": ""}
REFUSED = {**POD, "name": "b", "state": "refused", "reason": "host_network", "detail": "uses the host's network"}
SAID: dict[str, Any] = {
    "ready": True,
    "reason": "",
    "control": {"connected": True, "reason": ""},
    "bypass": {"node": False, "namespaces": []},
    "pods": [POD, {**POD, "name": "c", "state": "not_enrolled"}],
    "problems": [],
}


def test_a_node_where_all_is_well() -> None:
    row = status_row("n1", SAID, "ready")
    assert works(row) and (row["pods"], row["enrolled"], row["mode"]) == (2, 1, "capture")


@pytest.mark.parametrize(
    ("change", "column", "text", "well"),
    [
        ({"ready": False, "reason": "no World yet"}, "agent", "not ready: no World yet", False),
        ({"control": {"connected": False, "reason": "refused"}}, "control", "not connected", False),
        ({"control": {"connected": False, "reason": "no"}}, "problems", ["control plane: no"], False),
        ({"bypass": {"node": True, "namespaces": []}}, "mode", "bypass", True),
        ({"bypass": {"node": False, "namespaces": ["shop", "x"]}}, "mode", "bypass of shop,x", True),
        ({"problems": ["flows is nearly full"]}, "problems", ["flows is nearly full"], True),
        (
            {"pods": [POD, REFUSED]},
            "problems",
            ["shop/b: refused: host_network: uses the host's network"],
            True,
        ),
    ],
)
def test_what_is_not_well_is_said_where_it_belongs(change: dict[str, Any], column: str, text: str, well: bool) -> None:
    row = status_row("n1", SAID | change, "ready")
    assert row[column] == text and works(row) is well


def test_a_silent_agent_and_a_ztunnel_that_waits_are_no_success() -> None:
    assert status_row("n1", None, "ready")["agent"] == "no answer" and not works(status_row("n1", None, "ready"))
    assert not works(status_row("n1", SAID, "not ready: pending: proxy"))


@contextmanager
def answering(path: Path, code: int, text: str) -> Iterator[None]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def address_string(self) -> str:
            return "unix"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(code)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

    with socketserver.ThreadingUnixStreamServer(str(path), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("agent", "ztunnel", "code", "row"),
    [
        ((200, json.dumps(SAID)), (200, "ready\n"), 0, ("ready", "ready")),
        ((200, json.dumps(SAID)), (500, "not ready, pending: proxy\n"), 1, ("ready", "not ready: pending: proxy")),
        ((200, json.dumps(SAID)), None, 1, ("ready", "no answer")),
        (None, (200, "ready\n"), 1, ("no answer", "ready")),
    ],
)
def test_the_exit_code_is_by_who_answers(
    tmp_path: Path, agent: tuple[int, str] | None, ztunnel: tuple[int, str] | None, code: int, row: tuple[str, str]
) -> None:
    config = tmp_path / "node.yaml"
    config.write_text(f"node_name: n1\nrun_dir: {tmp_path}\n")

    def run(*words: str) -> Result:
        return CliRunner().invoke(cli, ["status", "--config", str(config), *words])

    with ExitStack() as stack:
        for name, answer in (("agent", agent), ("ztunnel", ztunnel)):
            if answer is not None:
                stack.enter_context(answering(tmp_path / f"{name}.sock", *answer))
        result = run("-o", "json")
        (found,) = json.loads(result.stdout)
        assert (result.exit_code, (found["agent"], found["ztunnel"])) == (code, row)
        silent = [name for name, answer in (("agent", agent), ("ztunnel", ztunnel)) if answer is None]
        assert [any(f"{name}.sock" in text for text in found["problems"]) for name in silent] == [True] * len(silent)
        table = run().output
        assert table.startswith("NODE ") and table.splitlines()[0].endswith(" PROBLEMS")
        assert all(f"n1: {problem}" in table for problem in found["problems"])
