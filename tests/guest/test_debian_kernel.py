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

LIMIT_S = 600
"""Four times what it takes on two cores."""
pytestmark = [pytest.mark.guest, pytest.mark.timeout(LIMIT_S + 60)]

CHECKS = "tests/guest/inside/checks.py"
SAME_NODE = "tests/net/test_same_node.py"
ORDER = "tests/net/test_redirect_order.py::TestOneWriter"
MEMORY = "tests/net/test_bounds.py::TestAMemoryLimitOfTheReceiver"
INSIDE = (  # without [parameters]: all of them
    f"{CHECKS}::test_the_kernel_is_debians",
    f"{CHECKS}::test_every_program_loads_and_redirection_is_possible",
    f"{CHECKS}::test_check_says_what_works_here",
    f"{CHECKS}::test_sixteen_flows_of_twenty_megabytes_are_exact",
    f"{CHECKS}::test_pods_have_filters_where_the_kernel_has_no_tcx",
    "tests/net/test_redirect.py::TestTheTcProgram::test_it_is_attached_once_and_goes[False]",
    f"{ORDER}::test_sends_that_are_taken_in_part[20000]",
    f"{ORDER}::test_what_is_written_behind_a_corked_byte_is_native",
    f"{ORDER}::test_files_that_are_sent",
    f"{MEMORY}::test_an_idle_receiver_gives_its_sender_eagain_and_no_enomem[4096]",
    f"{MEMORY}::test_an_idle_receiver_gives_its_sender_eagain_and_no_enomem[65536]",
    f"{MEMORY}::test_a_reading_one_gets_every_byte_and_its_sender_no_enomem",
    "tests/net/test_capture.py::test_a_captured_connection_reaches_ztunnel_with_its_record",
    "tests/net/test_delivery.py::TestDelivery::test_the_application_sees_the_true_client[2]",
    "tests/net/test_inbound.py::TestSteering::test_plaintext_goes_to_ztunnel_with_the_original_destination[2]",
    f"{SAME_NODE}::test_an_allowed_connection_goes_straight_to_the_pod",
    f"{SAME_NODE}::test_a_service_is_resolved_in_the_kernel_and_the_application_sees_what_it_dialled",
    f"{SAME_NODE}::test_without_a_current_allow_the_connection_goes_to_ztunnel[deny-verdict_denies]",
    f"{SAME_NODE}::test_a_new_generation_kills_what_was_authorized_and_is_on_its_way",
    "tests/net/test_same_node_flows.py::test_a_living_flow_shows_its_bytes_and_can_be_closed",
)


@dataclass(frozen=True)
class Guest:
    """What became of each test inside: "" if it passed, else what it said; and what they reported."""

    ended: vm.Ended
    outcome: dict[str, str]
    reported: dict[str, dict[str, str]]


def _name(node: str) -> str:
    """tests/net/test_leak.py::C::test_d[e] as the results write it: tests.net.test_leak.C.test_d[e]"""
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


@pytest.mark.parametrize("name", INSIDE, ids=lambda node: node.rpartition("/")[2])
def test_on_debians_kernel(guest, name, record_property):
    wanted = _name(name)
    cases = [case for case in guest.outcome if case.startswith(wanted) and case[len(wanted) :][:1] in ("", "[")]
    assert cases, f"it did not run: {guest.ended.tail()}"
    for case in cases:
        for key, value in guest.reported[case].items():
            record_property(key, value)
            print(f"{key}: {value}")
        assert not guest.outcome[case], guest.outcome[case]
