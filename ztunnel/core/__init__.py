"""Decisions of ztunnel: capture, route, authorize, tunnel, pool. Pure."""
