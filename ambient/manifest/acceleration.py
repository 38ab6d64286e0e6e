"""The annotation `ambient.mesh/acceleration` of a namespace or pod: how traffic within a node may travel.

off: through ztunnel, with mutual TLS. direct: authorized in the kernel, then plain TCP. redirect: the same, and moved
socket to socket, which is the owner's word that the application reads with recv. auto (the default): redirect on
kernels that pass the self-test for it, else direct. A pod's word stands before that of its namespace; of the two ends
of a connection the stricter holds.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

ACCELERATION: Final = "ambient.mesh/acceleration"


class Acceleration(enum.Enum):
    AUTO = "auto"
    REDIRECT = "redirect"
    DIRECT = "direct"
    OFF = "off"


def parse(pod: Mapping[str, str], namespace: Mapping[str, str]) -> tuple[Acceleration, str]:
    """From the annotations of both; and what is wrong with them. A word that is none means off."""
    for whose, given in (("pod", pod), ("namespace", namespace)):
        word = given.get(ACCELERATION)
        if word is None:
            continue
        try:
            return Acceleration(word), ""
        except ValueError:
            words = ", ".join(a.value for a in Acceleration)
            return Acceleration.OFF, f"annotation {ACCELERATION} of the {whose}: {word[:40]!r} is none of {words}: off"
    return Acceleration.AUTO, ""


def resolve(wanted: Acceleration, *, auto_redirect: bool) -> Acceleration:
    """Never AUTO. ``auto_redirect``: whether this kernel passed the self-test."""
    if wanted is Acceleration.AUTO:
        return Acceleration.REDIRECT if auto_redirect else Acceleration.DIRECT
    return wanted
