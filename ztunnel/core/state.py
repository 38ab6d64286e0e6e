"""What the control process answered its workers, and what of it a change of the World or of the pods changes.

Each answer is remembered with the names of what it rests on. When one of those changes it is decided again, and
only an answer that came out differently is pushed, to the workers that hold it. A question that cannot be
answered yet (no World; a pod that is just arriving) is held for a while instead of being refused at once.

Values in, values out: messages to send are returned as (worker, message) pairs; time is an argument.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeVar

from msgspec.structs import replace

from ambient.model.policy import Scope
from ambient.model.world import Diff, World
from ambient.node.messages import Pod
from ztunnel.core.authorize import decide_verdict
from ztunnel.core.local import Local
from ztunnel.core.messages import HOLD_S, AskRoute, AskVerdict, Forget, Message, Route, Synced, Verdict
from ztunnel.core.route import Touched, decide_route

UNKNOWN_HOLD_S: Final = 5.0
"""How long a question about a pod waits for the agent or the control plane to tell of it."""
ANSWERS_MAX: Final = 262_144
HELD_MAX: Final = 16_384

RouteKey = tuple[str, str, int]
VerdictKey = tuple[str, str, int, str, str]
Key = RouteKey | VerdictKey
Ask = AskRoute | AskVerdict
Answer = Route | Verdict
Outgoing = list[tuple[int, Message]]

_HOLD: Final = {
    "not_synced": HOLD_S,
    "unknown_source": UNKNOWN_HOLD_S,
    "unknown_destination": UNKNOWN_HOLD_S,
}


@dataclass(slots=True)
class _Kept:
    ask: Ask
    answer: Answer
    workers: set[int]
    touched: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Held:
    worker: int
    ask: Ask
    since: float


_V = TypeVar("_V")


def _before(old: Mapping[str, _V], removed: Iterable[str], changed: Iterable[str]) -> list[_V]:
    """The earlier form of what was removed or changed."""
    return [old[key] for key in (*removed, *changed) if key in old]


def names_of(change: Diff, old: World) -> set[str]:
    """Everything a change touches, in the names of `Touched`: what it was before and what it is now."""
    touched = Touched()
    workloads = _before(old.workloads, change.removed_workloads, (w.uid for w in change.workloads))
    for workload in (*change.workloads, *workloads):
        touched.workload(workload.uid)
        for address in workload.addresses:
            touched.address(address)
        for key, _ in workload.services:
            touched.service(key)
    services = _before(old.services, change.removed_services, (s.key for s in change.services))
    for service in (*change.services, *services):
        touched.service(service.key)
        for vip in service.vips:
            touched.address(vip)
    policies = _before(old.policies, change.removed_policies, (p.key for p in change.policies))
    for policy in (*change.policies, *policies):
        touched.policy(policy.key)
        if policy.scope is Scope.GLOBAL:
            touched.names.add("P*")
        elif policy.scope is Scope.NAMESPACE:
            touched.names.add(f"P:{policy.namespace}")
    return touched.names


@dataclass(slots=True)
class Decisions:
    """The tables of one control process. ``world`` is None until the first one came."""

    local: Local
    world: World | None = None
    generation: int = 0
    counters: dict[str, int] = field(default_factory=dict)
    _kept: dict[Key, _Kept] = field(default_factory=dict)
    _index: dict[str, set[Key]] = field(default_factory=dict)
    _held: list[_Held] = field(default_factory=list)

    def ask(self, worker: int, ask: Ask, now: float) -> Outgoing:
        """Answer a worker's question, or hold it: then the answer comes from `expire` or a change."""
        kept = self._kept.get(_key(ask)) or (
            self._kept.get(_key(replace(ask, source_ip=""))) if isinstance(ask, AskVerdict) else None
        )
        if kept is not None and kept.answer.reason not in _HOLD:
            kept.workers.add(worker)
            return [(worker, kept.answer)]
        answer, touched = self._decide(ask)
        if answer.reason in _HOLD and len(self._held) < HELD_MAX:
            self._held.append(_Held(worker, ask, now))
            self._count("held")
            return []
        return [(worker, self._keep(worker, ask, answer, touched))]

    def apply(self, world: World, change: Diff) -> Outgoing:
        """Take the World over; returns what must be pushed."""
        old, self.world = self.world, world
        self.generation += 1
        if old is None:
            return self._again(set(self._kept)) + self._retry()
        return self._again(self._keys(names_of(change, old))) + self._retry()

    def put_pod(self, pod: Pod) -> Outgoing:
        """Raises ValueError for an address that is none; then nothing has changed."""
        before = self.local.pods.get(pod.uid)
        self.local = self.local.put(pod)
        self.generation += 1
        return self._pods_changed([pod] if before is None else [before, pod])

    def remove_pod(self, uid: str) -> Outgoing:
        pod = self.local.pods.get(uid)
        if pod is None:
            return []
        self.local = self.local.remove(uid)
        self.generation += 1
        return self._pods_changed([pod])

    def forget(self, worker: int, message: Forget) -> None:
        for route in message.routes:
            self._drop(worker, route)
        for verdict in message.verdicts:
            self._drop(worker, verdict)

    def forget_worker(self, worker: int) -> None:
        """The worker is gone or starts anew: it holds nothing and waits for nothing."""
        self._held = [h for h in self._held if h.worker != worker]
        for key in list(self._kept):
            self._drop(worker, key)

    def expire(self, now: float) -> Outgoing:
        """Answer, with a refusal, what has been held for too long."""
        late: list[_Held] = []
        held: list[_Held] = []
        for entry in self._held:
            waited = now - entry.since
            due = waited >= UNKNOWN_HOLD_S and waited >= _HOLD.get(self._decide(entry.ask)[0].reason, 0.0)
            (late if due else held).append(entry)
        self._held = held
        out: Outgoing = []
        for entry in late:
            answer, touched = self._decide(entry.ask)
            self._count(f"refused_{answer.reason}")
            out.append((entry.worker, self._keep(entry.worker, entry.ask, answer, touched)))
        return out

    @property
    def held(self) -> int:
        return len(self._held)

    @property
    def kept(self) -> int:
        return len(self._kept)

    def answers(self) -> list[Answer]:
        """Everything the workers were told, for the config dump."""
        return [kept.answer for kept in self._kept.values()]

    def _decide(self, ask: Ask) -> tuple[Answer, frozenset[str]]:
        touched = Touched()
        answer: Answer
        if isinstance(ask, AskRoute):
            answer = decide_route(self.world, self.local, ask, self.generation, touched)
        else:
            answer = decide_verdict(self.world, self.local, ask, self.generation, touched)
        return answer, frozenset(touched.names)

    def _keep(self, worker: int, ask: Ask, answer: Answer, touched: frozenset[str]) -> Answer:
        """Remember an answer so that its change is pushed. What cannot be remembered must not be allowed."""
        if isinstance(ask, AskVerdict) and isinstance(answer, Verdict) and not answer.source_ip:
            if answer.reason == "source_address_needed":
                return answer  # answers the malformed question only, not those with an address
            ask = replace(ask, source_ip="")
        key = _key(ask)
        kept = self._kept.get(key)
        if kept is not None:
            kept.workers.add(worker)
            return kept.answer
        if len(self._kept) >= ANSWERS_MAX:
            self._count("refused_too_many_decisions")
            if isinstance(answer, Route):
                return replace(answer, kind="refused", hops=(), reason="too_many_decisions")
            return replace(answer, allow=False, policy="", reason="too_many_decisions")
        self._kept[key] = _Kept(ask, answer, {worker}, touched)
        for name in touched:
            self._index.setdefault(name, set()).add(key)
        return answer

    def _pods_changed(self, pods: list[Pod]) -> Outgoing:
        touched = Touched()
        for pod in pods:
            touched.pod(pod.uid)
            touched.workload(pod.workload_uid)
            touched.names.update(f"a:{address}" for address in Local.of("", [pod]).addresses())
        return self._again(self._keys(touched.names)) + self._retry()

    def _keys(self, names: Iterable[str]) -> set[Key]:
        found: set[Key] = set()
        for name in names:
            found |= self._index.get(name, set())
        return found

    def _again(self, keys: set[Key]) -> Outgoing:
        """Decide again; pushes for what came out differently."""
        out: Outgoing = []
        ask_again: set[int] = set()
        for key in keys:
            kept = self._kept[key]
            answer, touched = self._decide(kept.ask)
            if isinstance(answer, Verdict) and isinstance(kept.ask, AskVerdict):
                if answer.reason == "source_address_needed":
                    # cached for every source address, and now that address matters
                    ask_again |= kept.workers
                    for worker in tuple(kept.workers):
                        self._drop(worker, key)
                    continue
                answer = replace(answer, source_ip=kept.ask.source_ip)
            if touched != kept.touched:
                self._reindex(key, kept, touched)
            if replace(answer, generation=kept.answer.generation) == kept.answer:
                continue
            kept.answer = answer
            out.extend((worker, answer) for worker in sorted(kept.workers))
        if out:
            self._count("pushed", len(out))
        out.extend((worker, Synced()) for worker in sorted(ask_again))
        return out

    def _retry(self) -> Outgoing:
        """Answer what is held and can now be decided."""
        out: Outgoing = []
        still: list[_Held] = []
        for entry in self._held:
            answer, touched = self._decide(entry.ask)
            if answer.reason in _HOLD:
                still.append(entry)
            else:
                out.append((entry.worker, self._keep(entry.worker, entry.ask, answer, touched)))
        self._held = still
        return out

    def _reindex(self, key: Key, kept: _Kept, touched: frozenset[str]) -> None:
        for name in kept.touched - touched:
            self._unindex(name, key)
        for name in touched - kept.touched:
            self._index.setdefault(name, set()).add(key)
        kept.touched = touched

    def _unindex(self, name: str, key: Key) -> None:
        keys = self._index.get(name)
        if keys is not None:
            keys.discard(key)
            if not keys:
                del self._index[name]

    def _drop(self, worker: int, key: Key) -> None:
        kept = self._kept.get(key)
        if kept is None:
            return
        kept.workers.discard(worker)
        if not kept.workers:
            del self._kept[key]
            for name in kept.touched:
                self._unindex(name, key)

    def _count(self, name: str, by: int = 1) -> None:
        self.counters[name] = self.counters.get(name, 0) + by


def _key(ask: Ask) -> Key:
    if isinstance(ask, AskRoute):
        return (ask.source, ask.ip, ask.port)
    return (ask.destination, ask.destination_ip, ask.port, ask.identity, ask.source_ip)
