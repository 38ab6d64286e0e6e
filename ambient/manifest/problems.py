"""What is wrong with an object of the user's, as a value to report; nothing here decides what follows from it."""

from __future__ import annotations

from dataclasses import dataclass

from ambient.errors import ConfigFault


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One finding: ``where`` is kind and namespace/name, ``field`` a path in it, ``rule`` what it must satisfy.

    A ``notice`` is something left out by design (an ExternalName service), anything else needs a repair.
    """

    where: str
    field: str
    rule: str
    notice: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.field}: {self.rule}" if self.field else f"{self.where}: {self.rule}"


def problem_of(fault: ConfigFault) -> Problem:
    """A fault as a problem. Our own faults carry ``object: field`` in ``where``."""
    where, _, field = fault.where.partition(": ")
    said = fault.value not in ("", field)  # a decoder's rule already says what it found
    return Problem(where, field, (f"{fault.value!r}: {fault.rule}" if said else fault.rule)[:500])


def reference(kind: str, namespace: str, name: str) -> str:
    """How messages name an object: ``Pod shop/cart-1``, ``Node n1``."""
    return f"{kind} {namespace}/{name}" if namespace else f"{kind} {name}"
