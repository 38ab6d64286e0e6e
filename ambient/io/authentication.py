"""Who calls: bearer tokens, reviewed by the Kubernetes API, with a short and bounded memory.

A token is kept as its hash only. A review that fails because the API server does not answer is no verdict:
the call fails as unavailable and nothing is remembered.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Sequence

from ambient.control.certificates import Caller
from ambient.errors import PeerFault, PlatformFault

Review = Callable[[str], Awaitable[Caller | None]]
"""Ask the Kubernetes API about a token: its owner, or None if it is not valid for the audience istio-ca. Raises
AmbientError if there is no answer."""

ACCEPTED_S = 60.0
REFUSED_S = 10.0
ENTRIES_MAX = 4096
REVIEWS_AT_ONCE_MAX = 32
REVIEWS_OF_PEER_MAX = 8
"""Of one address: whoever can reach the port can send tokens, and must not make all others wait."""
REVIEW_TIMEOUT_S = 10.0
TOKEN_CHARS_MAX = 16 * 1024


_Verdicts = OrderedDict[bytes, tuple[float, Caller | None]]


class Unauthenticated(PeerFault):
    """No token, or not a good one."""


class Authenticator:
    """Remembers verdicts: accepted tokens for a minute at most, refused ones for ten seconds."""

    def __init__(self, review: Review, clock: Callable[[], float] = time.monotonic) -> None:
        self.reviews = 0
        self._review = review
        self._clock = clock
        # apart, so that no number of bad tokens displaces a good one
        self._accepted: _Verdicts = OrderedDict()
        self._refused: _Verdicts = OrderedDict()
        self._asking: dict[bytes, asyncio.Task[Caller | None]] = {}
        self._peers: Counter[str] = Counter()
        self._slots = asyncio.Semaphore(REVIEWS_AT_ONCE_MAX)

    async def authenticate(self, metadata: Sequence[tuple[str, str | bytes]], peer: str = "") -> Caller:
        """The caller of a call with this metadata. ``peer`` is the address it comes from. Raises Unauthenticated with
        the reason, PlatformFault if the Kubernetes API gives no answer or too many tokens wait for one."""
        token = _token(metadata)
        digest = hashlib.sha256(token.encode()).digest()
        found = self._accepted.get(digest) or self._refused.get(digest)
        if found is not None and self._clock() < found[0]:
            caller = found[1]
        else:
            task = self._asking.get(digest)
            if task is None:
                if len(self._asking) >= ENTRIES_MAX:
                    raise PlatformFault("too many tokens wait for their review")
                if self._peers[peer] >= REVIEWS_OF_PEER_MAX:
                    raise PlatformFault(f"more than {REVIEWS_OF_PEER_MAX} tokens of {peer} wait for their review")
                task = asyncio.create_task(self._ask(token, digest))
                self._asking[digest] = task
                self._peers[peer] += bool(peer)
                task.add_done_callback(lambda done: self._asked(digest, peer, done))
            # one review serves every call that waits for it, so one caller going away must not cancel it
            caller = await asyncio.shield(task)
        if caller is None:
            raise Unauthenticated(
                "the Kubernetes API does not accept the token for audience istio-ca: expired, of another cluster, or"
                " its pod is gone"
            )
        return caller

    async def _ask(self, token: str, digest: bytes) -> Caller | None:
        async with self._slots:
            self.reviews += 1
            try:
                async with asyncio.timeout(REVIEW_TIMEOUT_S):
                    caller = await self._review(token)
            except TimeoutError:
                raise PlatformFault(
                    f"the Kubernetes API did not review the token within {REVIEW_TIMEOUT_S:.0f} s"
                ) from None
        self._accepted.pop(digest, None)
        self._refused.pop(digest, None)
        verdicts, life_s = (self._accepted, ACCEPTED_S) if caller else (self._refused, REFUSED_S)
        verdicts[digest] = (self._clock() + life_s, caller)
        while len(verdicts) > ENTRIES_MAX:
            verdicts.popitem(last=False)
        return caller

    def _asked(self, digest: bytes, peer: str, done: asyncio.Task[Caller | None]) -> None:
        self._asking.pop(digest, None)
        self._peers[peer] -= 1
        if self._peers[peer] <= 0:
            del self._peers[peer]
        if not done.cancelled():
            done.exception()  # the waiting calls have it; without them nobody else would look


def _token(metadata: Sequence[tuple[str, str | bytes]]) -> str:
    values = [value for key, value in metadata if key.lower() == "authorization"]
    if not values:
        raise Unauthenticated("no authorization metadata: send 'authorization: Bearer <service account token>'")
    if len(values) > 1:
        raise Unauthenticated("several authorization values")
    text = values[0] if isinstance(values[0], str) else values[0].decode("latin-1")
    scheme, _, token = text.partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated("authorization is not 'Bearer <token>'")
    if len(token) > TOKEN_CHARS_MAX or not token.isascii():
        raise Unauthenticated("the token is too long or not ASCII")
    return token
