"""When certificates are fetched: half life, backoff, priorities, limits."""

from __future__ import annotations

import pytest

from ztunnel.core.renewal import BACKOFF_MAX_S, CONCURRENT_MAX, RENEW_MIN_S, Priority, Renewals

DAY = 86400.0


def test_a_certificate_is_renewed_at_half_its_life_or_a_little_earlier() -> None:
    renewals = Renewals()
    renewals.want("a", Priority.WARMUP, 0.0)
    assert renewals.start(0.0) == ["a"]
    renewals.succeeded("a", 0.0, DAY, 1.0, 0.0)
    assert renewals.next_due() == DAY / 2
    assert renewals.start(DAY / 2 - 1) == [] and renewals.start(DAY / 2) == ["a"]
    renewals.succeeded("a", 0.0, DAY, 1.0, 0.999999)
    due = renewals.next_due()
    assert due is not None and DAY * 0.449 < due < DAY * 0.451


def test_a_certificate_that_is_past_half_its_life_when_it_comes_is_not_fetched_in_a_loop() -> None:
    renewals = Renewals()
    renewals.want("a", Priority.WARMUP, 0.0)
    renewals.start(0.0)
    renewals.succeeded("a", -DAY, 1.0, 100.0, 0.0)
    assert renewals.next_due() == 100.0 + RENEW_MIN_S


def test_a_failed_fetch_is_tried_again_after_1_s_doubling_to_150() -> None:
    renewals = Renewals()
    renewals.want("a", Priority.REALTIME, 0.0)
    now, delays = 0.0, []
    for _ in range(10):
        assert renewals.start(now) == ["a"]
        delay = renewals.failed("a", now, 0.5)
        delays.append(delay)
        assert renewals.start(now + delay - 0.001) == []
        now += delay
    assert delays == [1, 2, 4, 8, 16, 32, 64, 128, BACKOFF_MAX_S, BACKOFF_MAX_S]
    assert renewals.failing("a")


@pytest.mark.parametrize(("random", "wanted"), [(0.0, 0.8), (0.5, 1.0), (1.0, 1.2)])
def test_backoff_has_a_fifth_of_jitter(random: float, wanted: float) -> None:
    renewals = Renewals()
    renewals.want("a", Priority.REALTIME, 0.0)
    renewals.start(0.0)
    assert renewals.failed("a", 0.0, random) == pytest.approx(wanted)


def test_a_success_ends_the_backoff_and_a_returning_control_plane_cuts_it_short() -> None:
    renewals = Renewals()
    renewals.want("a", Priority.REALTIME, 0.0)
    for _ in range(8):
        renewals.start(1e6)
        renewals.failed("a", 1e6, 0.5)
    renewals.retry_failed(1e6 + 1)
    assert renewals.start(1e6 + 1) == ["a"]
    renewals.succeeded("a", 1e6, 1e6 + DAY, 1e6, 0.0)
    assert not renewals.failing("a")
    renewals.retry_failed(1e6 + 2)
    assert renewals.start(1e6 + 2) == [], "what did not fail is not fetched early"


def test_at_most_eight_run_at_once_and_those_somebody_waits_for_go_first() -> None:
    renewals = Renewals()
    for n in range(10):
        renewals.want(f"warm-{n}", Priority.WARMUP, 0.0)
    renewals.want("urgent", Priority.REALTIME, 5.0)
    renewals.want("warm-9", Priority.REALTIME, 5.0)
    first = renewals.start(5.0)
    assert len(first) == CONCURRENT_MAX and first[:2] == ["warm-9", "urgent"]
    assert renewals.start(5.0) == []
    renewals.succeeded(first[0], 0.0, DAY, 5.0, 0.0)
    assert len(renewals.start(5.0)) == 1


def test_a_renewal_yields_to_a_first_certificate() -> None:
    renewals = Renewals()
    for n in range(CONCURRENT_MAX):
        renewals.want(f"old-{n}", Priority.WARMUP, 0.0)
    for identity in renewals.start(0.0):
        renewals.succeeded(identity, 0.0, 100.0, 0.0, 0.0)
    renewals.want("new", Priority.WARMUP, 60.0)
    assert renewals.start(60.0)[0] == "new"


def test_what_was_forgotten_is_neither_fetched_nor_kept() -> None:
    renewals = Renewals()
    renewals.want("a", Priority.WARMUP, 0.0)
    renewals.start(0.0)
    renewals.drop("a")
    renewals.succeeded("a", 0.0, DAY, 0.0, 0.0)
    assert "a" not in renewals and renewals.next_due() is None and renewals.failed("a", 0.0, 0.5) == 0.0
