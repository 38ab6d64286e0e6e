"""`ambient bypass` and `ambient diff` against an agent's socket that gives chosen answers."""

from __future__ import annotations

import http.server
import json
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from click.testing import CliRunner

from ambient.cli import cli, target
from ambient.cli.why import Ztunnels
from ambient.datapath.drift import compare, differing
from ambient.datapath.render import Names
from ambient.datapath.values import ServiceKey, ServiceValue, WorkloadValue
from ambient.errors import PlatformFault
from ambient.settings import NodeSettings


class Agent:
    """Answers what `answers` says, and remembers what it was asked."""

    def __init__(self, directory: Path) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: list[tuple[str, str, dict[str, list[str]]]] = []
        self.config = directory / "node.yaml"
        self.config.write_text(f"node_name: n1\nrun_dir: {directory}\nbpffs_dir: {directory}\n")
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def address_string(self) -> str:
                return "unix"

            def log_message(self, *_: Any) -> None:
                pass

            def answer(self) -> None:
                url = urlsplit(self.path)
                outer.asked.append((self.command, url.path, parse_qs(url.query)))
                known = outer.answers.get(url.path)
                body = json.dumps(known).encode() if known is not None else b"not now\n"
                self.send_response(200 if known is not None else 503)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = answer

        self.server = socketserver.ThreadingUnixStreamServer(str(directory / "agent.sock"), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def run(self, *words: str) -> Any:
        return CliRunner().invoke(cli, [*words, "--config", str(self.config)])


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    found = Agent(tmp_path)
    yield found
    found.server.shutdown()
    found.server.server_close()


BYPASSED = {"node": True, "namespaces": ["shop"], "pods": ["shop/a"], "applied": True}


def test_bypass_asks_the_agent_and_shows_what_it_answers(agent: Agent) -> None:
    agent.answers["/bypass"] = BYPASSED
    result = agent.run("bypass", "on", "--namespace", "shop", "-o", "json")
    assert result.exit_code == 0, result.output
    row = {"node": "n1", "mode": "bypass", "namespaces": ["shop"], "pods": ["shop/a"], "applied": True}
    assert json.loads(result.output) == [row]
    assert agent.asked == [("POST", "/bypass", {"on": ["1"], "namespace": ["shop"]})]
    assert agent.run("bypass", "off").exit_code == 0
    assert agent.asked[-1] == ("POST", "/bypass", {"on": ["0"]})
    assert "shop/a" in agent.run("bypass", "status").output
    assert agent.asked[-1][0] == "GET"


def test_bypass_that_is_not_in_the_kernel_yet_or_refused_is_a_failure(agent: Agent) -> None:
    agent.answers["/bypass"] = {**BYPASSED, "applied": False}
    assert agent.run("bypass", "on").exit_code == 1
    del agent.answers["/bypass"]
    result = agent.run("bypass", "on")
    assert result.exit_code == 1 and "not now" in result.output


DRIFT = {
    "map": "workloads",
    "key": "10.0.0.1",
    "drift": "differs",
    "name": "shop/a",
    "wanted": {"workload": 1, "flags": ["enrolled", "local"], "generation": 5},
    "actual": {"workload": 1, "flags": [], "generation": 5},
}


def test_diff_exits_1_on_drift_and_0_without(agent: Agent) -> None:
    agent.answers["/diff"] = {"drift": []}
    result = agent.run("diff")
    assert (result.exit_code, "holds what it should" in result.output) == (0, True)
    agent.answers["/diff"] = {"drift": [DRIFT]}
    result = agent.run("diff")
    assert result.exit_code == 1
    assert "flags=enrolled,local" in result.output and "generation" not in result.output
    assert agent.run("diff", "--map", "services").exit_code == 0
    assert json.loads(agent.run("diff", "-o", "json").output)[0]["actual"]["generation"] == 5


def test_repair_exits_by_what_is_left(agent: Agent) -> None:
    agent.answers["/repair"] = {"drift": [DRIFT], "left": []}
    result = agent.run("diff", "--repair", "-o", "json")
    assert result.exit_code == 0 and json.loads(result.output)[0]["repaired"] is True
    agent.answers["/repair"] = {"drift": [DRIFT], "left": [DRIFT]}
    result = agent.run("diff", "--repair", "-o", "json")
    assert result.exit_code == 1 and json.loads(result.output)[0]["repaired"] is False


def test_comparing_finds_missing_extra_and_different_entries_and_no_others() -> None:
    names = Names({1: "shop/a"}, {2: "shop/web"})
    same = WorkloadValue(1, 3, 7)
    wanted = {"10.0.0.1": same, "10.0.0.2": same, "10.0.0.3": same}
    actual = {"10.0.0.1": same, "10.0.0.2": WorkloadValue(1, 1, 7), "10.0.0.4": same}
    rows = {row["key"]: row for row in compare("workloads", wanted, actual, names)}
    assert {key: row["drift"] for key, row in rows.items()} == {
        "10.0.0.2": "differs",
        "10.0.0.3": "missing",
        "10.0.0.4": "extra",
    }
    assert differing(rows["10.0.0.2"]) == ("flags=enrolled,local", "flags=enrolled")
    assert rows["10.0.0.3"]["name"] == "shop/a" and rows["10.0.0.3"]["actual"] == {}
    (row,) = compare("services", {}, {ServiceKey("fd00::1", 80): ServiceValue(2, 4)}, names)
    assert (row["key"], row["name"], row["actual"]["flags"]) == ("[fd00::1]:80", "shop/web", ["waypoint"])


def test_a_map_nobody_compares_is_misuse_and_repair_is_of_all(agent: Agent) -> None:
    agent.answers["/diff"] = {"drift": []}
    assert agent.run("diff", "--map", "nosuch").exit_code == 2
    assert agent.run("diff", "--map", "sk_lookup").exit_code == 0
    agent.answers["/repair"] = {"drift": [DRIFT], "left": []}
    result = agent.run("diff", "--map", "workloads", "--repair")
    assert result.exit_code == 2 and ("POST", "/repair", {}) not in agent.asked


def test_a_diff_without_an_answer_is_told_from_drift(agent: Agent) -> None:
    result = agent.run("diff")
    assert result.exit_code == 2 and "n1" in result.output and "holds what it should" not in result.output
    assert agent.run("diff", "-o", "json").exit_code == 2


@pytest.fixture
def two(agent: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Agent:
    """The agent is that of a lab's node n1; of n2 nobody answers."""
    for name, directory in (("n1", tmp_path), ("n2", tmp_path / "nowhere")):
        file = tmp_path / "labs" / "l" / "nodes" / name / "node.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(f"node_name: {name}\nrun_dir: {directory}\nbpffs_dir: {directory}\n")
    monkeypatch.setattr(target, "_files", lambda *_: sorted((tmp_path / "labs").glob("*/nodes/*/node.yaml")))
    return agent


@pytest.mark.parametrize(
    ("words", "answer", "code"),
    [
        (("bypass", "status"), {"/bypass": BYPASSED}, 1),
        (("bypass", "on"), {"/bypass": BYPASSED}, 1),
        (("diff",), {"/diff": {"drift": [DRIFT]}}, 2),
    ],
)
def test_what_one_node_says_is_shown_though_another_is_silent(
    two: Agent, words: tuple[str, ...], answer: dict[str, Any], code: int
) -> None:
    two.answers |= answer
    result = CliRunner().invoke(cli, [*words, "-o", "json"])
    assert result.exit_code == code
    assert [row["node"] for row in json.loads(result.stdout)] == ["n1"]
    assert "ambient: n2: " in result.stderr and "is the node running?" in result.stderr


def test_a_ztunnel_that_did_not_answer_is_asked_once(
    agent: Agent, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent, answering = (NodeSettings(node_name=n, run_dir=str(tmp_path / n)) for n in ("n1", "n2"))
    (tmp_path / "n2").mkdir()
    (tmp_path / "n2" / "ztunnel.sock").symlink_to(tmp_path / "agent.sock")
    agent.answers["/config_dump"] = {"services": []}
    ztunnels = Ztunnels()
    assert ztunnels.world((silent, answering)) == {"services": []}
    assert ztunnels.first((silent, answering), "/config_dump") == {"services": []}
    assert capsys.readouterr().err.count("n1: ") == 1
    assert ztunnels.first((silent,), "/why", port=80) is None
    with pytest.raises(PlatformFault, match=r"n1/ztunnel\.sock: nobody listens"):
        ztunnels.world((silent,))


def test_no_connection_is_not_claimed_where_nobody_could_be_asked(agent: Agent) -> None:
    result = agent.run("connections")
    assert result.exit_code == 1 and "as far as could be looked at" in result.output
