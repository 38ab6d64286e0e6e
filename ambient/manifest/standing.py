"""What each policy object of a kind stands for: what it says; after a bad change what it said last; and where it never
said anything good, something closed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from ambient.errors import ConfigFault
from ambient.manifest.objects import PolicyObject
from ambient.manifest.problems import Problem, problem_of, reference

_Object = TypeVar("_Object", bound=PolicyObject)
_Form = TypeVar("_Form")


class Standing(Generic[_Object, _Form]):
    """``judge`` raises ConfigFault for an object that cannot be judged; ``closed`` is what then stands for it, and
    ``meaning`` says that in words."""

    def __init__(
        self,
        judge: Callable[[_Object], tuple[_Form, tuple[Problem, ...]]],
        closed: Callable[[_Object], _Form],
        meaning: str,
    ) -> None:
        self._judge = judge
        self._close = closed
        self._meaning = meaning
        self._closed: set[str] = set()
        self.forms: dict[str, _Form] = {}
        """By the object's key."""

    def change(self, key: str, item: _Object | None) -> tuple[Problem, ...]:
        """Take up an object as it is now, None if it is gone. Returns what is wrong with it."""
        if item is None:
            self.forms.pop(key, None)
            self._closed.discard(key)
            return ()
        try:
            self.forms[key], problems = self._judged(item)
        except ConfigFault as fault:
            if key in self.forms and key not in self._closed:
                standing = "its last good form stays in force"
            else:
                self.forms[key], standing = self._close(item), f"until then {self._meaning}"
                self._closed.add(key)
            problem = problem_of(fault)
            return (Problem(problem.where, problem.field, f"{problem.rule}; {standing}"),)
        self._closed.discard(key)
        return problems

    def _judged(self, item: _Object) -> tuple[_Form, tuple[Problem, ...]]:
        """What we ourselves fail on is a fault of that object: it must neither stand open nor end the process."""
        try:
            return self._judge(item)
        except ConfigFault:
            raise
        except Exception as error:
            where = reference(type(item).__name__, item.namespace, item.name)
            raise ConfigFault(
                f"{where}: spec", "", f"cannot be judged: {type(error).__name__}: {error}"[:300]
            ) from error
