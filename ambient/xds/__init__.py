"""Delta xDS as state machines without sockets, and model <-> wire."""
