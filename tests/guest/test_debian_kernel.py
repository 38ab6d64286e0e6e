"""The kernel path on Debian's own kernel (6.1), in a virtual machine: loads, verifies, works.

One boot runs everything: the checks of inside/checks.py and a part of tests/net, through the same programs and the same
Python as here. Each test here reads the result of one.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from xml.etree import ElementTree

import pytest

from tests.guest import vm
from tests.support.require import require

LIMIT_S = 540
"""Three times what it takes on two cores that others use too."""
pytestmark = [pytest.mark.guest, pytest.mark.timeout(LIMIT_S + 60)]

CHECKS = "tests/guest/inside/checks.py"
INSIDE = (
    f"{CHECKS}::test_the_kernel_is_debians",
    f"{CHECKS}::test_every_program_loads_and_redirection_is_possible",
    f"{CHECKS}::test_check_says_what_works_here",
)


@dataclass(frozen=True)
class Guest:
    """What became of each test inside: "" if it passed, else what it said; and what they reported."""

    ended: vm.Ended
    outcome: dict[str, str]
    reported: dict[str, dict[str, str]]


def _name(node: str) -> str:
    """tests/a/test_b.py::C::test_d[e] as the results write it: tests.a.test_b.C.test_d[e]"""
    return node.replace(".py::", ".").replace("::", ".").replace("/", ".")


@pytest.fixture(scope="module")
def guest(tmp_path_factory) -> Guest:
    require("guest", "net")
    # The guest would compile them slowly, and for nothing: what it writes is lost.
    subprocess.run([sys.executable, "-m", "compileall", "-q", "ambient", "tests"], cwd=vm.ROOT, check=True)
    command = [sys.executable, "-m", "pytest", "-c", "tests/guest/inside/pytest.ini", "--rootdir", str(vm.ROOT)]
    command += ["--junitxml=/out/results.xml", "--durations=0", *INSIDE]
    scratch = tmp_path_factory.mktemp("guest")
    ended = vm.run(command, scratch, LIMIT_S, {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    results = ended.out / "results.xml"
    if not results.exists():
        pytest.fail(f"the guest did not get to the end (code {ended.code}):\n{ended.tail()}", pytrace=False)
    outcome, reported = {}, {}
    for case in ElementTree.parse(results).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        bad = [found for kind in ("failure", "error", "skipped") for found in case.findall(kind)]
        outcome[name] = "\n".join(f"{found.tag}: {found.text or found.get('message')}" for found in bad)
        reported[name] = {row.get("name", ""): row.get("value", "") for row in case.iter("property")}
    return Guest(ended, outcome, reported)


@pytest.mark.parametrize("name", INSIDE)
def test_on_debians_kernel(guest, name, record_property):
    found = _name(name)
    assert found in guest.outcome, guest.ended.tail()
    for key, value in guest.reported[found].items():
        record_property(key, value)
        print(f"{key}: {value}")
    assert not guest.outcome[found], guest.outcome[found]
