"""`ambient bench`: what the mesh costs, measured beside no mesh and beside Envoy, in one run on one machine."""
