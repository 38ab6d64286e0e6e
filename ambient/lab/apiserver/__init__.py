"""An API server in memory: enough of the Kubernetes API for kubectl, our own reflector and the lab's controllers."""
