"""The three families of faults. A refusal is a value (see model.policy.Denied); a fault is an exception.

Every message names the object, the field where there is one, and the likely cause or next step, because
it is read by the operator who has to act on it. Foreign exceptions become one of these where the foreign
call is made and nowhere else.
"""

from __future__ import annotations


class AmbientError(Exception):
    """Base of every fault this project raises on purpose; caught only at the edge of a process or request."""


class OurFault(AmbientError):
    """An invariant of our own was broken: a bug, or state on disk or in the kernel that we did not write."""


class PeerFault(AmbientError):
    """Somebody outside sent what they must not: a peer's frame, a manifest, an xDS resource, a CNI request."""


class PlatformFault(AmbientError):
    """The machine cannot do it: a missing kernel feature, package, permission, mount or limit."""


class ConfigFault(PeerFault):
    """A setting or manifest is wrong. ``where`` is the object and field path, ``rule`` what it must satisfy."""

    def __init__(self, where: str, value: object, rule: str) -> None:
        super().__init__(f"{where}: {value!r}: {rule}")
        self.where = where
        self.value = value
        self.rule = rule


class Misuse(ConfigFault):
    """The command line was given what it cannot mean: exit code 2, as for an unknown option."""


class LayoutMismatch(PlatformFault):
    """Pinned maps of another layout version; nothing may read or write them."""
