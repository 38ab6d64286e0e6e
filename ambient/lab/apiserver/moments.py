"""Moments as objects carry them."""

from __future__ import annotations

from datetime import datetime


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC with seconds, as metadata carries it."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_timestamp(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
