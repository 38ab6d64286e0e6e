"""All of ambient's shared I/O: kernel maps, namespaces, Kubernetes API, gRPC."""
