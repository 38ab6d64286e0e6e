"""The agent's part in redirection: which pods' interfaces are looked at, and which sockets come out again."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from typing import Final

from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import FlowValue, TupleKey
from ambient.errors import AmbientError
from ambient.io import bpf_tc, netns, sock_diag
from ambient.io.bpf_maps import Maps

SETTLED_S: Final = 5.0
"""A sender that decided to redirect just before its receiver turned blocking has long done it."""
_BLOCKING: Final = LAYOUT["FLOW_BLOCKING"]
_INSERTED: Final = LAYOUT["END_INSERTED"]

log = logging.getLogger(__name__)


class Redirection:
    """On the open maps, which stay the caller's. Call `follow` and `take_out` about once a second."""

    def __init__(self, bpffs_dir: str, maps: Maps) -> None:
        self._bpffs = bpffs_dir
        self._maps = maps
        self._attached: dict[str, int] = dict.fromkeys(bpf_tc.attached(bpffs_dir), 0)
        """Pod UID -> inode of the namespace it was attached in."""
        self._counted = 0
        self._blocking: dict[TupleKey, float] = {}
        self.taken_out = 0
        self.problems: dict[str, str] = {}
        """Pod UID -> why its interfaces are not looked at; its flows are direct."""

    def follow(self, pods: Mapping[str, int]) -> None:
        """``pods``: UID -> descriptor of the namespace, of those that are enrolled and want `redirect`."""
        for uid in [uid for uid in self._attached if uid not in pods]:
            self._leave(uid)
        for uid, fd in pods.items():
            self.add(uid, fd)

    def add(self, uid: str, fd: int) -> None:
        """Look at one pod from now on, so that its first connections qualify; `follow` keeps it so."""
        try:
            inode = netns.inode(fd)
            if self._attached.get(uid) == inode:
                return
            bpf_tc.attach(self._bpffs, fd, uid)
        except (AmbientError, OSError) as error:
            if self.problems.get(uid) != str(error):
                log.error("pod %s: redirection: %s; its flows are direct", uid, error)
            self.problems[uid] = str(error)
            return
        self.problems.pop(uid, None)
        self._attached[uid] = inode

    def forget(self, uid: str) -> None:
        """The pod's attachments went with its sk_lookup."""
        self._attached.pop(uid, None)
        self.problems.pop(uid, None)

    def _leave(self, uid: str) -> None:
        # The descriptor may be closed by now: a link needs none, and filters go with the interface.
        self.forget(uid)
        try:
            bpf_tc.detach(self._bpffs, None, uid)
        except (AmbientError, OSError) as error:
            log.warning("pod %s: redirection stays attached: %s", uid, error)

    def take_out(self, spaces: Mapping[int, int], now: float | None = None) -> int:
        """Take sockets of flows that turned blocking out of `sockets`, once nothing redirected can be in them.

        ``spaces``: cookie of a pod's namespace -> its descriptor. Returns how many came out. A socket in a sockhash may
        fail a blocking recv() with EAGAIN; out of it, it is as any other. Looks at all flows only when one turned.
        """
        now = time.monotonic() if now is None else now
        counted = self._maps.counters()["redirect_blocking"]
        if counted != self._counted:
            self._counted = counted
            for key, flow in self._maps.flows.items():
                if _BLOCKING in (flow.client.state, flow.server.state):
                    self._blocking.setdefault(key, now)
        removed = 0
        for key in [key for key, since in self._blocking.items() if now - since >= SETTLED_S]:
            found = self._maps.flows.get(key)
            # Another connection may have the same addresses by now, and be in the middle of redirecting.
            if found is None or _BLOCKING not in (found.client.state, found.server.state):
                del self._blocking[key]
                continue
            left = 0
            for own, cookie, inserted in _ends(key, found):
                if not inserted or own not in self._maps.sockets:
                    continue
                if self._holds_nothing(spaces.get(found.netns_client if own != key else found.netns_server), cookie):
                    removed += self._maps.sockets.delete(own)
                else:
                    left += 1
            if not left:
                del self._blocking[key]
        self.taken_out += removed
        return removed

    def _holds_nothing(self, netns_fd: int | None, cookie: int) -> bool:
        if netns_fd is None:
            return False
        try:
            with sock_diag.open_diag(netns_fd) as sock:
                return any(s.cookie == cookie and s.held == 0 for s in sock_diag.dump(sock))
        except (OSError, AmbientError):
            return False


def _ends(key: TupleKey, flow: FlowValue) -> Iterable[tuple[TupleKey, int, bool]]:
    """(key in `sockets`, cookie, whether it was inserted) of both ends."""
    client = TupleKey(key.remote, key.local, key.remote_port, key.local_port)
    yield key, flow.server.cookie, bool(flow.server.sighting & _INSERTED)
    yield client, flow.client.cookie, bool(flow.client.sighting & _INSERTED)
