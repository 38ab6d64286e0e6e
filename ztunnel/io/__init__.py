"""Sockets, TLS, processes of ztunnel."""
