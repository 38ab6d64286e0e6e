/* maps.h - the kernel maps. Declared once, pinned by the loader, opened by everybody else.
 *
 * Hash maps are not preallocated: a node that carries little holds little. Their limits are in layout.h.
 */
#ifndef AMBIENT_MAPS_H
#define AMBIENT_MAPS_H

#include "layout.h"

/* enrolled: cookie of a pod's network namespace -> its workload, its addresses, its share.
 * Written by the agent at enrolment (flows and refused: by programs). Read by connect, sendmsg, sock_ops.
 * An entry dies when the agent un-enrols the pod. 1,024: ten times the pods Kubernetes puts on a node. */
BPF_F_TABLE("hash", __u64, struct enrolled_value, enrolled, ENROLLED_MAX, BPF_F_NO_PREALLOC);

/* workloads: address -> workload, for every pod of the mesh and of the cluster as far as known.
 * Written by the agent: from its own subscription, and of this node's pods from what it knows of them itself. Read by
 * connect, probe, sock_ops, sk_lookup. An entry dies with the address. 65,536: a cluster of 50,000 pods with both
 * families for some; beyond that `settings.complete` stays 0 and ztunnel decides. */
BPF_F_TABLE("hash", struct address, struct workload_value, workloads, WORKLOADS_MAX, BPF_F_NO_PREALLOC);

/* services: VIP and port -> service. Written by the agent, read by connect. Dies with the Service. Sized as
 * workloads, with the same consequence when full. */
BPF_F_TABLE("hash", struct service_key, struct service_value, services, SERVICES_MAX, BPF_F_NO_PREALLOC);

/* endpoints: service port and slot -> endpoint, healthy ones in this node's order of preference. Written by the agent:
 * slots first, then the count in `services`; when fewer, the count first. Read by connect. Dies with the endpoint; a
 * missing slot sends the connection to ztunnel. 131,072: two for each service port there can be. */
BPF_F_TABLE("hash", struct endpoint_key, struct endpoint_value, endpoints, ENDPOINTS_MAX, BPF_F_NO_PREALLOC);

/* verdicts: source identity, local destination, port -> whether it may connect, written ahead by the agent. Read by
 * connect. Void as soon as the destination's generation is another one; dies with the destination. 131,072: 100
 * destinations, 400 identities, three ports; what finds no room is decided by ztunnel. */
BPF_F_TABLE("hash", struct verdict_key, struct verdict_value, verdicts, VERDICTS_MAX, BPF_F_NO_PREALLOC);

/* pending: socket -> what its last connect (or DNS datagram) was turned into. Written by connect, probe,
 * sendmsg, sock_ops; read by those and by getpeername and recvmsg. Dies with the socket, or at its next
 * connect. No limit of its own: it is part of the socket. */
BPF_SK_STORAGE(pending, struct pending_value);

/* hashed: socket -> that it was put into `sockets`, once in its life. Written by enrol; read by it and by setsockopt. Dies
 * with the socket. */
BPF_SK_STORAGE(hashed, struct hashed_value);

/* redirects: a captured connection -> what the application dialled. Written by sock_ops at TCP_CONNECT_CB under
 * the client's 4-tuple, moved by it at PASSIVE_ESTABLISHED under the cookie of ztunnel's accepted socket; read
 * by ztunnel after accept(). Dies with the socket it is filed under. 131,072: captured connections alive at one
 * time on the node, at most FLOWS_SHARE_DEFAULT a pod. */
BPF_F_TABLE("hash", struct redirect_key, struct redirect_value, redirects, REDIRECTS_MAX, BPF_F_NO_PREALLOC);

/* authorized: 4-tuple of a connection into a pod -> who let it in. Written by ztunnel for its own deliveries and
 * by sock_ops for the kubelet's probes and for connections within the node; read by sk_lookup and sock_ops. Dies at PASSIVE_ESTABLISHED of the pod's socket (not
 * earlier: with SYN cookies the listener is looked up once more) or at the close of the connecting one.
 * 65,536: connections being set up at one time. */
BPF_F_TABLE("hash", struct tuple_key, struct authorized_value, authorized, AUTHORIZED_MAX, BPF_F_NO_PREALLOC);

/* origins: 4-tuple of a delivered connection -> the client the application shall see. Written by ztunnel; read by
 * getpeername (and so by accept). Dies with the application's socket, or with ztunnel's if there never was one.
 * 65,536: inbound connections alive at one time on the node. */
BPF_F_TABLE("hash", struct tuple_key, struct origin_value, origins, ORIGINS_MAX, BPF_F_NO_PREALLOC);

/* flows: connection authorized in the kernel, seen from the server -> both its ends. Written by sock_ops from
 * TCP_CONNECT_CB on, by enrol and sk_msg, and by the agent, which takes over those of an older layout; read by telemetry
 * and the agent. Dies when the last of its sockets
 * closed and it was reported through `events`, or taken by the reader if that was full. 65,536: flows alive at one time
 * on the node. */
BPF_F_TABLE("hash", struct tuple_key, struct flow_value, flows, FLOWS_MAX, BPF_F_NO_PREALLOC);

/* events: closed flows, for telemetry. Written by sock_ops, consumed by one reader. 512 KiB: 1,600 closes between two
 * looks of the reader; what finds no room stays in `flows` until the reader sweeps it, so nothing is lost. */
BPF_RINGBUF_OUTPUT(events, 128);

/* counters: enum reason -> events since loading, per CPU. Written by programs, read by people and metrics.
 * Never dies. 64: room for reasons to come without a new layout. */
BPF_TABLE("percpu_array", __u32, __u64, counters, COUNTERS_MAX);

/* settings: 0 -> what the agent tells the programs. One entry of a hash and not of an array, so that a write
 * replaces it whole and no program reads half of two. First the loader leaves there what the kernel can do. Incomplete
 * until the agent wrote it, and missing in a layout that drains: programs then capture, and redirect nothing. */
BPF_F_TABLE("hash", __u32, struct settings_value, settings, SETTINGS_MAX, BPF_F_NO_PREALLOC);

/* listeners: pod address and kind -> ztunnel's listening socket. Written by the agent, read by sk_lookup.
 * The kernel removes a socket when it is closed. 8,192: eight for each enrolled pod there can be.
 * bcc's BPF_SOCKHASH has a 4-byte leaf, which user space cannot read, and no lookup: hence this table. */
struct listeners_table_t {
	struct listener_key key;
	__u64 leaf;
	struct bpf_sock *(*lookup)(struct listener_key *);
	int (*update)(struct listener_key *, __u64 *);
	int (*delete)(struct listener_key *);
	u32 max_entries;
	int flags;
};
__attribute__((section("maps/sockhash"))) struct listeners_table_t listeners = {.max_entries = LISTENERS_MAX};
BPF_ANNOTATE_KV_PAIR(listeners, struct listener_key, __u64);

/* sockets: 4-tuple as the socket itself sees it -> a socket whose bytes may be moved by redirection. Written by
 * enrol, both ends of a flow or none; the agent takes out what turned blocking, and the kernel what is closed. 65,536: half
 * of the flows there can be. */
struct sockets_table_t {
	struct tuple_key key;
	__u64 leaf;
	struct bpf_sock *(*lookup)(struct tuple_key *);
	int (*insert)(struct tuple_key *, void *);
	int (*delete)(struct tuple_key *);
	int (*sock_hash_update)(void *, struct tuple_key *, __u64);
	int (*msg_redirect_hash)(void *, struct tuple_key *, __u64);
	u32 max_entries;
	int flags;
};
__attribute__((section("maps/sockhash"))) struct sockets_table_t sockets = {.max_entries = SOCKETS_MAX};
BPF_ANNOTATE_KV_PAIR(sockets, struct tuple_key, __u64);

#endif
