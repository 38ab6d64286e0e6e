"""ambient: an ambient service mesh for Linux and Kubernetes.

Two flows, each readable left to right as a folder order:

    configuration:  Kubernetes objects -> manifest -> model -> control -> xds -> ztunnel's state;
                    -> node: datapath entries -> kernel maps
    connection:     bpf/ hook -> ztunnel listener -> ztunnel.core capture -> route -> authorize -> tunnel -> relay

Start with ambient.model.world, then ARCHITECTURE.md.
"""
