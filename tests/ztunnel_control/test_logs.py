"""The log on stdout: whoever reads it, or does not, nobody waits for them."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator

import pytest

from ztunnel.io import logs

PIPE_BYTES = 4096


class Pipe:
    """In the place of stdout, with room for a page; ``end`` is read by the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.end, self.given = os.pipe()
        fcntl.fcntl(self.given, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        monkeypatch.setattr(logs, "STDOUT", self.given)
        self.out = logs._Out()
        monkeypatch.setattr(logs, "_out", self.out)

    def close(self) -> None:
        for fd in (self.end, self.given, self.out._fd):
            try:
                os.close(fd)
            except OSError:
                pass  # one of them twice, where it has no description of its own

    def read(self) -> list[str]:
        return os.read(self.end, 1 << 20).decode().splitlines()


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipe]:
    found = Pipe(monkeypatch)
    yield found
    found.close()


@pytest.mark.parametrize(("form", "batch"), [("text", 1), ("json", 1), ("text", 50)])
def test_a_reader_that_stalls_loses_lines_is_told_how_many_and_stops_nobody(pipe: Pipe, form: str, batch: int) -> None:
    pipe.out.form = form
    lines = [f"{n}" + "x" * 1000 for n in range(200)]
    began = time.monotonic()
    for start in range(0, len(lines), batch):
        logs.write_lines(lines[start : start + batch])
    assert time.monotonic() - began < 5, "one wait, however many lines"
    found = pipe.read()
    logs.write_lines(["after"])
    found += pipe.read()
    whole = [line for line in found if line in lines]
    assert whole == lines[: len(whole)] and whole
    lost = [int(count) for line in found for count in re.findall(r"(\d+) lines were lost", line)]
    assert sum(lost) == len(lines) - len(whole) and found[-1] == "after"
    assert form == "text" or "lines were lost" in json.loads(found[-2])["message"]
    logs.write_lines(["and on"])
    assert pipe.read() == ["and on"]


def test_others_who_have_stdout_still_wait_for_their_reader(pipe: Pipe) -> None:
    logs.write_lines(["first"])
    assert os.get_blocking(pipe.given)


def test_a_reader_that_went_away_ends_nobody(pipe: Pipe) -> None:
    os.close(pipe.end)
    logs.write_lines(["nobody hears it"])
    pipe.end = pipe.given


def test_a_file_is_appended_to_by_its_own_description(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    with open(f"{tmp_path}/log", "w+b", buffering=0) as file:
        file.write(b"before\n")
        monkeypatch.setattr(logs, "STDOUT", file.fileno())
        monkeypatch.setattr(logs, "_out", logs._Out())
        logs.write_lines(["ours"])
        file.write(b"theirs\n")
        file.seek(0)
        assert file.read() == b"before\nours\ntheirs\n"
