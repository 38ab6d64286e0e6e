"""The plan of a root rotation: every holder always trusts what anybody may be signed with."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ambient.control.rotation import GAP_MAX_S, Rotation, Stage, Timing, advance, remaining_s, roles, start

TIMING = Timing(distribute_s=600.0, overlap_s=1200.0)


def begun(timing: Timing = TIMING) -> Rotation:
    rotation = start(Rotation(), timing)
    assert rotation is not None
    return rotation


def test_a_rotation_goes_through_every_stage_and_ends() -> None:
    rotation, now, seen = begun(), 1000.0, [Stage.ANNOUNCED]
    while rotation.stage is not Stage.STEADY:
        now += 100
        rotation = advance(rotation, now)
        if rotation.stage is not seen[-1]:
            seen.append(rotation.stage)
    assert seen == [Stage.ANNOUNCED, Stage.SWITCHED, Stage.STEADY]
    assert now == 1000 + 100 + 600 + 1200  # the first look starts the clock


def test_a_second_rotation_waits_for_the_first() -> None:
    assert start(begun(), TIMING) is None


def test_time_in_which_the_ca_was_away_does_not_count() -> None:
    rotation = advance(begun(), 1000.0)
    rotation = advance(rotation, 1000.0 + 10 * TIMING.distribute_s)
    assert rotation.stage is Stage.ANNOUNCED
    assert remaining_s(rotation) == TIMING.distribute_s


def test_a_clock_that_jumps_back_does_not_shorten_a_stage() -> None:
    rotation = advance(advance(begun(), 1000.0), 1100.0)
    assert remaining_s(advance(rotation, 500.0)) == remaining_s(rotation)


def test_a_steady_root_stays() -> None:
    assert advance(Rotation(), 10.0) == Rotation()
    assert remaining_s(Rotation()) is None


@given(st.lists(st.floats(0, GAP_MAX_S), min_size=1, max_size=60))
def test_the_signer_is_trusted_before_it_signs_and_after(steps: list[float]) -> None:
    """Holders have the bundle of any time within the last `distribute_s`; they hold leaves signed within the
    last `overlap_s`. Every leaf must chain to every bundle."""
    rotation, now = advance(begun(Timing(100.0, 300.0)), 0.0), 0.0
    history = [(now, rotation.stage)]
    for step in steps:
        now += step
        rotation = advance(rotation, now)
        history.append((now, rotation.stage))
    first_stage_at = {stage: at for at, stage in reversed(history)}
    switched, done = first_stage_at.get(Stage.SWITCHED), None
    if switched is not None:
        assert switched - first_stage_at[Stage.ANNOUNCED] >= 100.0
        done = next((at for at, stage in history if at > switched and stage is Stage.STEADY), None)
    if switched is not None and done is not None:
        assert done - switched >= 300.0
    for stage in Stage:
        assert roles(stage).signs in roles(stage).trusted
    assert set(roles(Stage.ANNOUNCED).trusted) == set(roles(Stage.SWITCHED).trusted) == {"old", "new"}


def test_the_default_timing_covers_renewal_and_expiry() -> None:
    timing = Timing.of(86400)
    assert timing.distribute_s > 86400 / 2
    assert timing.overlap_s > 86400
