"""The built plugin, executed as a container runtime does, against a real socket and against none."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ambient.node import cni
from tests.node.real_node import build_stub

RESULT = {"cniVersion": "0.3.1", "ips": [{"address": "10.1.0.7/24"}], "note": 'a "quoted" \\ { [ text'}
ENV = {
    "CNI_COMMAND": "ADD",
    "CNI_CONTAINERID": "c1",
    "CNI_NETNS": "/run/netns/x",
    "CNI_IFNAME": "eth0",
    "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web",
}


class Agent:
    """Answers one request after the other with what `answer` says; keeps the requests."""

    def __init__(self, path: Path) -> None:
        self.requests: list[bytes] = []
        self.answer: Callable[[bytes], bytes] = lambda raw: cni.Answer(0, "done").encode()
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen(4)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            with connection:
                raw = b""
                while part := connection.recv(65536):
                    raw += part
                self.requests.append(raw)
                try:
                    connection.sendall(self.answer(raw))
                except OSError:
                    pass

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(5)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    agent = Agent(tmp_path / "cni.sock")
    yield agent
    agent.close()


def run(tmp_path: Path, config: object = None, raw: bytes | None = None, **env: str) -> tuple[int, str]:
    netconf = {"cniVersion": "0.3.1", "runDir": str(tmp_path), "prevResult": RESULT} if config is None else config
    done = subprocess.run(
        [str(build_stub())],
        input=json.dumps(netconf).encode() if raw is None else raw,
        env=ENV | env,
        capture_output=True,
        timeout=30,
    )
    assert done.stderr == b"" and done.returncode >= 0
    return done.returncode, done.stdout.decode()


def code_of(text: str) -> int:
    body = json.loads(text)
    assert body["msg"]
    return int(body["code"])


def test_what_runs_needs_no_interpreter_and_no_library(tmp_path: Path) -> None:
    assert b"INTERP" not in subprocess.check_output(["readelf", "-lW", str(build_stub())])


def test_environment_and_input_reach_the_agent_whole_and_its_answer_the_runtime(agent: Agent, tmp_path: Path) -> None:
    agent.answer = lambda raw: cni.Answer(0, 'é "x" \\ \n\t \U0001f600').encode()
    config = {"cniVersion": "1.0.0", "runDir": str(tmp_path), "é": 'tab\t "quote" \\ \x7f \U0001f600'}
    code, out = run(tmp_path, config, CNI_ARGS='A="\\;B=é')
    assert (code, out) == (0, 'é "x" \\ \n\t \U0001f600')
    request = json.loads(agent.requests[0])
    assert json.loads(request["stdin"]) == config
    assert request["env"] == ENV | {"CNI_ARGS": 'A="\\;B=é'}


def test_the_agents_refusal_is_the_plugins(agent: Agent, tmp_path: Path) -> None:
    agent.answer = lambda raw: cni.error("0.3.1", 101, "no room").encode()
    code, out = run(tmp_path)
    assert code == 1 and code_of(out) == 101


def test_ascii_escapes_of_the_answer_are_undone(agent: Agent, tmp_path: Path) -> None:
    agent.answer = lambda raw: b' {"x": [1, {"code": 9}], "code" : 0 , "stdout":"\\u00e9\\ud83d\\ude00\\/\\b"}'
    assert run(tmp_path) == (0, "é\U0001f600/\b")


@pytest.mark.parametrize(
    ("command", "fails"), [("ADD", True), ("CHECK", True), ("DEL", False), ("GC", False), ("STATUS", False)]
)
def test_without_an_agent_only_adding_and_checking_fail(tmp_path: Path, command: str, fails: bool) -> None:
    code, out = run(tmp_path, CNI_COMMAND=command)
    assert (code != 0) is fails
    assert code_of(out) == cni.TRY_AGAIN_LATER if fails else out == ""


@pytest.mark.parametrize("answer", [b"", b"{", b"null", b'{"code": 0}', b'{"code": "x", "stdout": ""}', b"[" * 4000])
def test_an_answer_that_cannot_be_read_fails_closed(agent: Agent, tmp_path: Path, answer: bytes) -> None:
    agent.answer = lambda raw: answer
    code, out = run(tmp_path)
    assert code == 1 and code_of(out) == cni.TRY_AGAIN_LATER
    assert run(tmp_path, CNI_COMMAND="DEL") == (0, "")


def test_version_is_answered_without_an_agent_and_never_raised(tmp_path: Path) -> None:
    code, out = run(tmp_path, {"cniVersion": "0.4.0"}, CNI_COMMAND="VERSION")
    assert code == 0
    assert json.loads(out) == {"cniVersion": "0.4.0", "supportedVersions": list(cni.VERSIONS)}


def test_the_mesh_itself_starts_without_an_agent_and_nobody_else(tmp_path: Path) -> None:
    code, out = run(tmp_path, CNI_ARGS="K8S_POD_NAME=c;K8S_POD_NAMESPACE=ambient-system")
    assert code == 0 and json.loads(out) == RESULT
    for near in ("ambient-system2", "ambient-syste", "", "x;X=ambient-system"):
        assert run(tmp_path, CNI_ARGS=f"K8S_POD_NAMESPACE={near}")[0] == 1
    config = {"cniVersion": "0.3.1", "runDir": str(tmp_path), "systemNamespace": "mesh", "prevResult": RESULT}
    assert run(tmp_path, config, CNI_ARGS="K8S_POD_NAMESPACE=mesh")[0] == 0
    assert run(tmp_path, config, CNI_ARGS="K8S_POD_NAMESPACE=ambient-system")[0] == 1


def test_a_system_pod_without_a_previous_result_is_refused(tmp_path: Path) -> None:
    code, out = run(tmp_path, {"cniVersion": "0.3.1"}, CNI_ARGS="K8S_POD_NAMESPACE=ambient-system")
    assert code == 1 and code_of(out) == cni.INVALID_CONFIG


@pytest.mark.parametrize("raw", [b"", b"{", b'"', b'{"runDir":', b'{"runDir":"\\', b"\x00" * 50, b"{" * 5000, b"[]"])
def test_garbage_as_configuration_fails_adding_and_nothing_else(tmp_path: Path, raw: bytes) -> None:
    raw_env = {"CNI_ARGS": ""}
    # without runDir the default is asked; no agent of a test runs there, or it refuses what it cannot read
    code, out = run(tmp_path, raw=raw, **raw_env)
    assert code == 1 and code_of(out) > 0
    assert run(tmp_path, raw=raw, CNI_COMMAND="STATUS", **raw_env)[0] == 0


def test_too_long_an_input_is_refused(tmp_path: Path) -> None:
    code, out = run(tmp_path, raw=b'{"a": "' + b"x" * (1024 * 1024) + b'"}')
    assert code == 1 and code_of(out) == cni.INVALID_CONFIG


def test_a_command_that_is_missing_or_unknown_is_refused(tmp_path: Path) -> None:
    assert code_of(run(tmp_path, CNI_COMMAND="")[1]) == cni.INVALID_ENVIRONMENT
    assert code_of(run(tmp_path, CNI_COMMAND="FROB")[1]) == cni.INVALID_ENVIRONMENT
