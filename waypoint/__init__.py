"""waypoint: one Envoy per namespace for L7. Not built yet; the package name is reserved."""
