"""Changing the mesh's root without an instant in which two pods do not trust each other.

    steady      one root: it signs and is trusted
    announced   the new root is trusted too; the old one signs, until every holder has the new bundle
    switched    the new root signs; the old one is trusted, until everything it signed has expired
    steady      the old root is gone

Waiting is by time, because certificates are renewed at half life at the latest and each renewal brings the
bundle: nothing needs to be known of the holders. This module only decides; `ambient.io.ca` keeps the files.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final


class Stage(enum.Enum):
    STEADY = "steady"
    ANNOUNCED = "announced"
    SWITCHED = "switched"


@dataclass(frozen=True, slots=True)
class Timing:
    """How long each stage lasts, seconds."""

    distribute_s: float
    """announced: until every holder trusts the new root."""
    overlap_s: float
    """switched: until no certificate of the old root is left."""

    @staticmethod
    def of(lifetime_max_s: float) -> Timing:
        """Safe for certificates of at most this life: renewals are at half life, plus a tenth for failed tries."""
        return Timing(distribute_s=0.6 * lifetime_max_s, overlap_s=1.1 * lifetime_max_s)


GAP_MAX_S: Final = 300.0
"""Looks at the rotation further apart than this had an outage between them."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """``served_s`` is how long the CA has been at work in this stage, ``seen`` when it last looked (seconds since
    the epoch; 0: never)."""

    stage: Stage = Stage.STEADY
    timing: Timing = Timing(0.0, 0.0)
    served_s: float = 0.0
    seen: float = 0.0


@dataclass(frozen=True, slots=True)
class Roles:
    """What a stage means for the two roots. ``old`` is the only root while steady."""

    signs: str
    trusted: tuple[str, ...]


def roles(stage: Stage) -> Roles:
    match stage:
        case Stage.STEADY:
            return Roles("old", ("old",))
        case Stage.ANNOUNCED:
            return Roles("old", ("old", "new"))
        case Stage.SWITCHED:
            return Roles("new", ("old", "new"))


def start(rotation: Rotation, timing: Timing) -> Rotation | None:
    """The first step of a rotation; None if one is under way already."""
    return Rotation(Stage.ANNOUNCED, timing) if rotation.stage is Stage.STEADY else None


def remaining_s(rotation: Rotation) -> float | None:
    """Until the next step, if the CA keeps working; None while steady."""
    match rotation.stage:
        case Stage.STEADY:
            return None
        case Stage.ANNOUNCED:
            return max(0.0, rotation.timing.distribute_s - rotation.served_s)
        case Stage.SWITCHED:
            return max(0.0, rotation.timing.overlap_s - rotation.served_s)


def advance(rotation: Rotation, now: float) -> Rotation:
    """The rotation as the running CA must have it now: at most one step further, so that no stage is skipped.

    Only time in which the CA answered counts, for nobody could take the new bundle from one that was away.
    """
    if rotation.stage is Stage.STEADY:
        return rotation
    passed = now - rotation.seen
    served_s = rotation.served_s + (passed if 0 <= passed <= GAP_MAX_S else 0.0)
    looked = Rotation(rotation.stage, rotation.timing, served_s, now)
    if remaining_s(looked):
        return looked
    if looked.stage is Stage.ANNOUNCED:
        return Rotation(Stage.SWITCHED, looked.timing, 0.0, now)
    return Rotation()
