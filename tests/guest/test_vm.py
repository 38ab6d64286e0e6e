"""A guest never holds the tests up."""

from __future__ import annotations

import time

import pytest

from tests.guest import vm
from tests.support.require import require

pytestmark = pytest.mark.guest


def test_a_guest_that_does_not_end_is_killed_and_says_so(tmp_path):
    require("guest", "net")
    began = time.monotonic()
    ended = vm.run(["sleep", "1000"], tmp_path, limit_s=3)
    assert ended.code is None
    assert ended.tail().endswith("the guest did not end within 3 s and was killed")
    assert time.monotonic() - began < 60
