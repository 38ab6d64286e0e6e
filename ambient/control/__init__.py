"""The control plane's decisions. Pure."""
