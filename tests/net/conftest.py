"""Uses the lab of tests.support.lab_fixtures."""

from tests.support.lab_fixtures import a, b, lab, loaded_node, make_pod, node

__all__ = ["a", "b", "lab", "loaded_node", "make_pod", "node"]
