"""ztunnel: the per-node L4 proxy. core decides, io obeys."""
