"""What becomes of told connections: series of the metrics, and lines of the access log."""

from __future__ import annotations

import logging
import time

from msgspec.structs import replace

from ztunnel.core import messages
from ztunnel.core.attributes import Descriptions
from ztunnel.core.state import Decisions
from ztunnel.io import access_log, logs
from ztunnel.io.flow_groups import Group
from ztunnel.io.metrics import Metrics


class Recorder:
    """``decisions`` has the World and the pods by which connections are described."""

    def __init__(self, decisions: Decisions, metrics: Metrics, log_format: str) -> None:
        self._decisions = decisions
        self._metrics = metrics
        self._log_format = log_format
        self._describe = Descriptions().describe

    def events(self, serial: int, batch: messages.Events) -> None:
        """What a worker tells; its own number, or the kernel's, is ``serial``."""
        world, local, find = self._decisions.world, self._decisions.local, self._describe
        lines: list[str] = []
        for event in batch.events:
            bound = self._metrics.open_connection(serial, event.connection)
            bound = self._metrics.record(serial, event, bound.ends if bound else find(world, local, event))
            if event.event != "progress":
                whole = replace(event, sent=max(bound.sent, event.sent), received=max(bound.received, event.received))
                line = access_log.line(whole, bound.ends, self._log_format)
                if line is not None:
                    lines.append(line)
        if lines:
            logs.write_lines(lines)
        self._metrics.add_counters(batch.counters)

    def groups(self, groups: list[Group]) -> None:
        """Flows of the kernel that ended; those of each group are taken from it."""
        logged = logging.getLogger(access_log.SCOPE).isEnabledFor(logging.INFO)
        at = logs.timestamp(time.time())
        lines: list[str] = []
        for group in groups:
            flows, group.flows = group.flows, []
            sent, received = sum(flow[1] for flow in flows), sum(flow[2] for flow in flows)
            for told in group.told:
                self._metrics.record_ended(told.event, told.ends, len(flows), sent, received)
                if logged:
                    lines += [told.line % (at, *flow) for flow in flows]
        if lines:
            logs.write("".join(lines))
