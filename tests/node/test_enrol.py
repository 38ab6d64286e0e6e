"""The order of joining and leaving, seen as the steps that were taken."""

from __future__ import annotations

import pytest

from ambient.errors import PlatformFault
from ambient.node import enrol

JOINING = ["open_listeners", "put_addresses", "attach", "put_enrolled"]
LEAVING = [
    "annotate False",
    "acknowledged",
    "close_tunnels",
    "remove_enrolled",
    "drained",
    "detach",
    "hand_back 10",
    "leave_addresses",
]


class Recorder:
    """Takes every step and remembers it; fails at the one it is told to."""

    def __init__(self, fails: str = "", acknowledged: bool = True) -> None:
        self.taken: list[str] = []
        self._fails = fails
        self._acknowledged = acknowledged

    def _take(self, step: str) -> None:
        self.taken.append(step)
        if step == self._fails:
            raise PlatformFault(step)

    async def open_listeners(self) -> None:
        self._take("open_listeners")

    async def put_addresses(self) -> None:
        self._take("put_addresses")

    async def attach(self) -> None:
        self._take("attach")

    async def put_enrolled(self) -> None:
        self._take("put_enrolled")

    async def annotate(self, enabled: bool) -> None:
        self._take(f"annotate {enabled}")

    async def acknowledged(self, timeout_s: float) -> bool:
        self._take("acknowledged")
        return self._acknowledged

    async def close_tunnels(self) -> None:
        self._take("close_tunnels")

    async def remove_enrolled(self) -> None:
        self._take("remove_enrolled")

    async def drained(self, timeout_s: float) -> None:
        assert timeout_s == enrol.DRAIN_S
        self._take("drained")

    async def detach(self) -> None:
        self._take("detach")

    async def hand_back(self, drain_s: float) -> None:
        self._take(f"hand_back {drain_s:g}")

    async def leave_addresses(self) -> None:
        self._take("leave_addresses")

    async def remove_addresses(self) -> None:
        self._take("remove_addresses")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrol, "ACKNOWLEDGE_S", 0.02)
    monkeypatch.setattr(enrol, "SETTLE_S", 0.0)


async def test_a_pod_joins_in_order() -> None:
    steps = Recorder()
    await enrol.enrol(steps)
    assert steps.taken == JOINING


@pytest.mark.parametrize("failing", JOINING)
async def test_nothing_is_built_on_a_step_that_failed(failing: str) -> None:
    steps = Recorder(failing)
    with pytest.raises(PlatformFault):
        await enrol.enrol(steps)
    assert steps.taken == JOINING[: JOINING.index(failing) + 1]


async def test_a_pod_leaves_in_order() -> None:
    steps = Recorder()
    await enrol.leave(steps)
    assert steps.taken == LEAVING


async def test_peers_that_do_not_acknowledge_are_waited_for_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(delay: float) -> None:
        slept.append(delay)

    monkeypatch.setattr(enrol.asyncio, "sleep", sleep)
    await enrol.leave(Recorder(acknowledged=False))
    await enrol.leave(Recorder(acknowledged=True))
    assert len([d for d in slept if 0 < d <= 0.02]) == 1


async def test_a_pod_whose_annotation_cannot_be_removed_keeps_its_tunnels() -> None:
    steps = Recorder("annotate False")
    with pytest.raises(PlatformFault):
        await enrol.leave(steps)
    assert steps.taken == ["annotate False"]


@pytest.mark.parametrize("failing", ["", "remove_enrolled", "remove_addresses", "detach", "hand_back 0"])
async def test_forgetting_goes_on_whatever_fails(failing: str) -> None:
    steps = Recorder(failing)
    if failing:
        with pytest.raises(PlatformFault, match=failing):
            await enrol.forget(steps)
    else:
        await enrol.forget(steps)
    assert steps.taken == ["remove_enrolled", "remove_addresses", "detach", "hand_back 0"]


async def test_undoing_keeps_the_pods_address_as_that_of_a_pod_outside_the_mesh() -> None:
    steps = Recorder("detach")
    with pytest.raises(PlatformFault):
        await enrol.undo(steps)
    assert steps.taken == ["remove_enrolled", "detach", "leave_addresses", "hand_back 0"]
