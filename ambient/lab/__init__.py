"""Nodes and pods out of network namespaces, with an API server: a mesh on one machine."""
