"""Kubernetes objects -> model. Pure; every problem names object, field path and rule."""
