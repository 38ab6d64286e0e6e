/* layout.h - the one definition of every key, value, flag and limit of the kernel maps.
 *
 * Included by the eBPF programs and parsed by ambient/datapath/layout.py, which therefore accepts only
 * this restricted C: #define NAME NUMBER, enum with explicit values, and structs of fixed-width integers,
 * fixed arrays of them, and structs defined above. Every struct has explicit padding named pad*, and a
 * _Static_assert of its size. The hash of this file names the pin directory: another layout, another one.
 *
 * Addresses are 16 bytes, IPv4 as ::ffff:a.b.c.d, whatever the socket's family. Ports are in HOST order
 * in two bytes unless the name ends in _be. Identifiers of workloads and services are node-local numbers
 * given by the agent; 0 means unknown.
 */
#ifndef AMBIENT_LAYOUT_H
#define AMBIENT_LAYOUT_H

#define LAYOUT_VERSION 2

/* Limits: entries per map. A full map refuses and counts; see the share below. */
#define ENROLLED_MAX 1024
#define WORKLOADS_MAX 65536
#define SERVICES_MAX 65536
#define REDIRECTS_MAX 131072
#define AUTHORIZED_MAX 65536
#define ORIGINS_MAX 65536
#define LISTENERS_MAX 8192
#define COUNTERS_MAX 64
#define EXEMPT_CGROUPS_MAX 8
#define KUBELET_CGROUPS_MAX 4
#define CLUSTER_RANGES_MAX 8
#define SETTINGS_MAX 1
#define ENDPOINTS_MAX 131072
#define VERDICTS_MAX 131072
#define FLOWS_MAX 65536
#define SOCKETS_MAX 65536
#define EVENTS_BYTES 524288         /* of the ring buffer: a power of two and whole pages */
#define SLOTS_MAX 1024              /* slots of one service port: endpoints, repeated by weight */
#define FLOWS_SHARE_DEFAULT 8192    /* enrolled_value.flows_max unless the agent knows better */
#define AGENT_SILENT_S 15           /* after so long without a heartbeat ztunnel decides what verdicts would have */
#define CGROUP_LEVELS_MAX 12        /* ancestors of a process that are compared with a set of cgroups */

/* Ports of the mesh; ambient/ports.py holds the same numbers and a test compares them. */
#define PORT_OUTBOUND 15001
#define PORT_INBOUND_PLAINTEXT 15006
#define PORT_HBONE 15008
#define PORT_DNS 15053
#define PORT_DNS_SERVER 53

/* Why something was refused or let pass; the index of the counters map. Names are CLI and metric words. */
enum reason {
	REASON_NONE = 0,
	REASON_CAPTURED = 1,            /* connect sent to ztunnel */
	REASON_NOT_MESH = 2,            /* destination known not to be in the mesh: left alone */
	REASON_BYPASS = 3,              /* operator's bypass or open on failure: left alone */
	REASON_EXEMPT = 4,              /* a socket of ztunnel or the agent: left alone */
	REASON_LOOPBACK = 5,            /* destination is loopback: left alone */
	REASON_RECURSION = 6,           /* connect to a mesh port refused */
	REASON_NO_PENDING = 7,          /* no room for the socket's record: refused */
	REASON_REDIRECTS_FULL = 8,      /* redirects full: no record, so ztunnel closes it */
	REASON_SHARE_EXCEEDED = 9,      /* workload is beyond its share of per-flow entries: refused */
	REASON_AUTHORIZED = 10,         /* inbound: let through by an authorized entry */
	REASON_PROBE = 11,              /* inbound: kubelet probe */
	REASON_STEERED = 12,            /* inbound: steered to the plaintext capture listener */
	REASON_NO_LISTENER = 13,        /* inbound: listener missing, dropped */
	REASON_HBONE = 14,              /* inbound: tunnel to ztunnel's own listener */
	REASON_TUPLE_MISMATCH = 15,     /* TCP_CONNECT_CB: the remote is not the recorded one */
	REASON_AUTHORIZED_FULL = 16,    /* authorized full: the flow will be steered */
	REASON_DNS = 17,                /* DNS sent to the proxy */
	REASON_BIND_FAILED = 18,        /* the pod's address could not be bound: refused */
	REASON_STALE_AUTHORIZED = 19,   /* authorized entry of an older generation or another workload: ignored */
	REASON_NOT_SYNCED = 20,         /* settings.complete is 0: captured although unknown */
	REASON_ZTUNNEL = 21,            /* inbound: let through for ztunnel's own delivery */
	REASON_LISTENER_MISMATCH = 22,  /* inbound: the listener in the map cannot take the connection, dropped */
	REASON_KERNEL = 23,             /* same node, authorized in the kernel; inbound: let through for it */
	REASON_NO_VERDICT = 24,         /* same node, but no verdict was written ahead: captured */
	REASON_STALE_VERDICT = 25,      /* same node, but the verdict is of another generation: captured */
	REASON_VERDICT_DENIES = 26,     /* same node, the verdict denies: captured, ztunnel refuses and logs */
	REASON_NO_ENDPOINT_SLOT = 27,   /* the chosen slot of a service is not there: captured */
	REASON_ACCELERATION_OFF = 28,   /* same node, but one of the two ends wants ztunnel: captured */
	REASON_FLOWS_FULL = 29,         /* flows full: the connection will be steered */
	REASON_FLOW_UNREPORTED = 30,    /* the ring buffer was full: the closed flow waits in flows */
	REASON_REDIRECT_INSERTED = 31,  /* socket put into the sockhash */
	REASON_REDIRECT_BLOCKING = 32,  /* receiver turned blocking: its flow stays native */
	REASON_REDIRECT_HIGH = 33,      /* receiver holds enough: the direction went native */
	REASON_REDIRECT_PRESSED = 34,   /* memory may be short: the message went native, instead of ENOMEM for its sender */
	REASON_REDIRECT_ZEROCOPY = 35,  /* a socket uses SO_ZEROCOPY: not put into the sockhash */
	REASON_REDIRECT_OPTION = 36,    /* TCP_ULP or SO_ZEROCOPY on a socket of the sockhash refused */
	REASON_REDIRECT_EDGE = 37,      /* somebody waits edge-triggered or for RDHUP: not put into the sockhash, or native */
	REASON_FOREIGN_SOURCE = 38,     /* same node, but the source address is not the pod's: not authorized, steered */
	REASON_TUPLE_TAKEN = 39,        /* same node, but a flow that lives has these addresses: not authorized, steered */
	REASON_MAX = 40,
};

/* What a listener in a pod's namespace is for. */
enum listener_kind {
	LISTENER_OUTBOUND = 1,          /* 15001 */
	LISTENER_INBOUND_PLAINTEXT = 2, /* 15006 */
	LISTENER_HBONE = 3,             /* 15008 */
};

/* Flags of a workload or service address. */
#define WORKLOAD_ENROLLED 1     /* reached by HBONE */
#define WORKLOAD_LOCAL 2        /* runs on this node */
#define WORKLOAD_WAYPOINT 4     /* has a waypoint */
#define WORKLOAD_ALLOW_ANY 8    /* no policy selects it */

#define WORKLOAD_BYPASS 16      /* operator's bypass of this local pod: plaintext is not steered */
#define WORKLOAD_OPEN 32        /* open on failure: the same once the heartbeat stopped */

/* Flags of an enrolled workload. */
#define ENROLLED_BYPASS 1       /* operator's bypass: connects are left alone */
#define ENROLLED_OPEN 2         /* open on failure: the same once the heartbeat stopped */

/* Acceleration a pod wants, `auto` already resolved; the stricter of both ends holds: off, then direct, then redirect.
 * None of the three is off. */
#define ENROLLED_OFF 8
#define ENROLLED_DIRECT 16
#define ENROLLED_REDIRECT 32
#define WORKLOAD_OFF 64
#define WORKLOAD_DIRECT 128
#define WORKLOAD_REDIRECT 256

/* What of a flow's acceleration was agreed: flow_value.acceleration. */
#define ACCELERATION_OFF 0
#define ACCELERATION_DIRECT 1
#define ACCELERATION_REDIRECT 2

/* settings.acceleration: what the self-tests of the loader found this kernel able to do; CROWDED is the agent's. */
#define CAN_REDIRECT 1          /* redirected bytes are charged, kTLS is refused: `redirect` is honoured */
#define AUTO_REDIRECT 2         /* splice() and FIONREAD see all bytes there are: `auto` means `redirect` */
#define DRAINING 4              /* a newer layout is at work: native only, nothing enters `sockets` */
#define NO_OFFSETS 8            /* why not CAN_REDIRECT: the kernel's BTF is missing or lacks a field */
#define NO_CHARGE 16            /* ... redirected bytes are not charged to the receiver */
#define NO_PROGRAMS 32          /* ... the kernel refuses one of the programs */
#define NO_DESTROY 128          /* it cannot close a connection (SOCK_DESTROY): nothing is authorized within the node */
#define CROWDED 256             /* `flows` is nearly full: ztunnel takes what is new, which would be steered and not in STRICT */
#define ULP_ALLOWED 64          /* the kernel may let TCP_ULP "tls" onto a socket in a sockhash: the setsockopt hook does not */

/* Bounds of what a receiver may hold unread by redirection. */
#define REDIRECT_HIGH_BYTES 1048576
#define REDIRECT_MESSAGES 256

/* settings.mode */
#define MODE_CAPTURE 0
#define MODE_BYPASS 1

struct address {
	__u8 bytes[16];
};

/* enrolled: netns cookie -> workload. The agent writes all but flows and refused, and keeps those two when it
 * writes an entry again. A captured or kernel-authorized connection counts from TCP_CONNECT_CB until its socket closes. */
struct enrolled_value {
	struct address address4;    /* what an unbound IPv4 socket is bound to; :: if none */
	struct address address6;    /* the same for IPv6; :: if none */
	__u32 workload;
	__u32 flows_max;            /* this workload's share of per-flow entries */
	__u32 flows;                /* connections alive, captured or kernel-authorized; written by programs */
	__u32 flags;
	__u64 refused;              /* connects refused for the share; written by programs */
	__u32 identity;             /* node-local number of the workload's identity; 0: no verdict can apply */
	__u32 pad;
};
_Static_assert(sizeof(struct enrolled_value) == 64, "enrolled_value");

/* workloads: address -> workload. */
struct workload_value {
	__u32 workload;
	__u32 flags;                /* WORKLOAD_* */
	__u64 generation;           /* changes when the address is reused and when any right to reach it may have changed */
};
_Static_assert(sizeof(struct workload_value) == 16, "workload_value");

/* services: VIP and port -> service. */
struct service_key {
	struct address vip;
	__u16 port;
	__u8 pad[6];
};
_Static_assert(sizeof(struct service_key) == 24, "service_key");

struct service_value {
	__u32 service;
	__u32 flags;                /* WORKLOAD_WAYPOINT */
	__u32 endpoints;            /* usable slots of this port in `endpoints`; 0: ztunnel chooses */
	__u32 pad;
};
_Static_assert(sizeof(struct service_value) == 16, "service_value");

/* endpoints: service port and slot -> endpoint. Slots 0 to service_value.endpoints - 1; weights by repetition. */
struct endpoint_key {
	__u32 service;
	__u16 port;                 /* of the service */
	__u16 slot;
};
_Static_assert(sizeof(struct endpoint_key) == 8, "endpoint_key");

struct endpoint_value {
	struct address address4;    /* what a client of an IPv4 VIP is sent to; :: if none */
	struct address address6;    /* the same for IPv6 */
	__u32 workload;
	__u16 port;                 /* of the endpoint */
	__u16 pad;
};
_Static_assert(sizeof(struct endpoint_value) == 40, "endpoint_value");

/* verdicts: source identity, destination workload and port -> verdict. Port 0 stands for every port that has no entry
 * of its own; it is written last and removed first, so that with it all others are there. */
struct verdict_key {
	__u32 identity;             /* node-local number */
	__u32 workload;
	__u16 port;
	__u16 pad;
};
_Static_assert(sizeof(struct verdict_key) == 12, "verdict_key");

struct verdict_value {
	__u64 generation;           /* of the destination when it was evaluated: another one makes the entry void */
	__u32 allow;
	__u32 policy;               /* node-local number of the policy that decided; 0 none */
};
_Static_assert(sizeof(struct verdict_value) == 16, "verdict_value");

/* pending_value.state */
#define PENDING_DECIDED 0       /* the connect hook wrote it */
#define PENDING_COUNTED 1       /* TCP_CONNECT_CB counted it in enrolled_value.flows: close must uncount it */
#define PENDING_AUTHORIZED 2    /* TCP_CONNECT_CB wrote an authorized entry: close must remove it */
#define PENDING_FLOW 3          /* the same, and counted it, and wrote a flow: close must end that too */

/* pending (sk_storage): what the connect hook decided for this socket. */
struct pending_value {
	struct address original;    /* what the application asked for: getpeername shows it */
	struct address remote;      /* where the socket was sent */
	struct address endpoint;    /* endpoint chosen by the hook, :: if none */
	struct address client;      /* local address at TCP_CONNECT_CB */
	__u64 netns;                /* cookie of the socket's namespace */
	__u64 generation;           /* of the destination workload when decided */
	__u32 workload;             /* destination workload, 0 if not known */
	__u32 source;               /* source workload */
	__u16 original_port;
	__u16 remote_port;
	__u16 endpoint_port;
	__u16 client_port;          /* local port at TCP_CONNECT_CB, 0 before */
	__u16 reason;               /* enum reason */
	__u16 state;                /* PENDING_* */
	__u32 identity;             /* of the source */
	__u32 policy;               /* that allowed it, 0 none */
	__u16 acceleration;         /* ACCELERATION_* */
	__u16 pad;
};
_Static_assert(sizeof(struct pending_value) == 112, "pending_value");

/* hashed (sk_storage): this socket is, or was, in `sockets`. The kernel takes it out when it is closed and not before, so
 * also not when it is disconnected and used again. */
struct hashed_value {
	__u64 since_ns;
};
_Static_assert(sizeof(struct hashed_value) == 8, "hashed_value");

/* redirects: two kinds of key in one map. Until accept the key is the client's 4-tuple in its namespace
 * (cookie 0); from PASSIVE_ESTABLISHED on it is the accepted socket's cookie (everything else 0). */
struct redirect_key {
	__u64 cookie;
	__u64 netns;
	struct address client;
	__u16 client_port;
	__u16 listener_port;        /* PORT_OUTBOUND, or PORT_DNS for DNS over TCP */
	__u32 pad;
};
_Static_assert(sizeof(struct redirect_key) == 40, "redirect_key");

struct redirect_value {
	struct address original;
	struct address endpoint;    /* :: if the hook chose none */
	struct address client;
	__u64 netns;
	__u64 created_ns;           /* bpf_ktime_get_ns */
	__u32 source;               /* source workload */
	__u16 original_port;
	__u16 endpoint_port;
	__u16 client_port;
	__u16 pad[3];
};
_Static_assert(sizeof(struct redirect_value) == 80, "redirect_value");

/* The 4-tuple of a connection into a pod, seen from the pod: key of authorized, origins and flows. */
struct tuple_key {
	struct address local;
	struct address remote;
	__u16 local_port;
	__u16 remote_port;
	__u32 pad;
};
_Static_assert(sizeof(struct tuple_key) == 40, "tuple_key");

/* authorized: 4-tuple -> who let it in. */
struct authorized_value {
	__u64 generation;           /* of the destination workload; 0: not checked */
	__u64 created_ns;
	__u32 workload;             /* destination workload, which must own the local address */
	__u16 reason;               /* REASON_PROBE, REASON_ZTUNNEL, REASON_KERNEL */
	__u16 pad;
	__u64 netns;                /* cookie of the pod's namespace, where alone the entry may be used up; 0: not known */
};
_Static_assert(sizeof(struct authorized_value) == 32, "authorized_value");

/* origins: 4-tuple -> the client address shown to the application by getpeername and accept. */
struct origin_value {
	struct address client;
	__u64 created_ns;
	__u64 accepted;             /* cookie of the application's socket once it exists: the entry dies with it */
	__u16 client_port;
	__u8 pad[6];
	__u64 netns;                /* cookie of the pod's namespace: anybody can have its address in another; 0: not known */
};
_Static_assert(sizeof(struct origin_value) == 48, "origin_value");

/* flow_end.state: of the direction in which this end sends. Written by sk_msg only. */
#define FLOW_NATIVE 0
#define FLOW_REDIRECT 1
#define FLOW_BLOCKING 2         /* the receiver turned blocking: both directions are native for good */

/* flow_end.flags: each is set once, by an atomic addition. */
#define END_CLOSED 1            /* by sock_ops */
#define END_NUMBERED 2          /* by sk_msg: what this end sends arrives under the numbers it was sent with */

/* flow_end.sighting: what the tc program saw of this end; written by it only. */
#define END_NONBLOCK 1          /* its file was O_NONBLOCK when last seen */
#define END_INSERTED 2          /* it is, or was, in `sockets` */
#define END_ZEROCOPY 4          /* SO_ZEROCOPY is set: never inserted */
#define END_EDGE 8              /* somebody waits for it edge-triggered or for RDHUP: never inserted */
#define END_READY 16            /* it may be inserted; it is as soon as the other end may be, too */
#define END_WAITED 32           /* somebody was seen to wait for it by level */

/* flow_value.flags */
#define FLOW_UNREPORTED 1       /* both ends are closed and the ring buffer was full: the reader sweeps it */

/* One end of a flow. Its counters are of what this end sent. */
struct flow_end {
	__u64 sock;                 /* struct sock *, valid only while its skc_cookie equals cookie; 0 unknown */
	__u64 cookie;               /* SO_COOKIE; 0: there is no such socket (yet) */
	__u64 native_bytes;         /* through TCP; known when an end closes */
	__u64 redirect_bytes;       /* by sk_msg */
	__u64 redirect_messages;
	__u64 switches;             /* between native and redirect */
	__u64 last_native_ns;       /* when sk_msg last let a message pass natively */
	__u64 seen_ns;              /* when the tc program last looked at the socket */
	__u32 queued_messages;      /* redirected since the receiver's sk_rmem_alloc last read 0 */
	__u32 state;                /* FLOW_* */
	__u32 flags;                /* END_CLOSED, END_NUMBERED */
	__u32 sighting;             /* END_NONBLOCK, END_INSERTED, END_ZEROCOPY, END_EDGE, END_READY, END_WAITED */
	__u32 seen_seq;             /* copied_seq when first seen O_NONBLOCK, when inserted, when the other end last turned to
	                             * redirection; that also is what had been written natively to it then */
	__u32 lookups;              /* of the socket by the tc program, which are bounded */
};
_Static_assert(sizeof(struct flow_end) == 88, "flow_end");

/* flows: 4-tuple of a kernel-authorized connection, seen from the server -> both directions. */
struct flow_value {
	struct flow_end client;
	struct flow_end server;
	__u64 created_ns;
	__u64 generation;           /* of the destination when authorized */
	__u64 netns_client;         /* cookies */
	__u64 netns_server;         /* 0 until the server's socket exists */
	struct address original;    /* what the client dialled */
	__u32 source;               /* workloads */
	__u32 destination;
	__u32 identity;             /* of the source */
	__u32 policy;               /* that allowed it, 0 none */
	__u16 original_port;
	__u16 reason;               /* REASON_KERNEL */
	__u16 acceleration;         /* ACCELERATION_* */
	__u16 pad;
	__u32 flags;                /* FLOW_* */
	__u32 pad2;
};
_Static_assert(sizeof(struct flow_value) == 256, "flow_value");

/* events (ring buffer): one when the last end of a flow closed. */
struct flow_event {
	struct tuple_key key;
	struct flow_value value;
	__u64 closed_ns;
};
_Static_assert(sizeof(struct flow_event) == 304, "flow_event");

/* listeners (sockhash): pod address and kind -> ztunnel's listening socket; the leaf is a u64. */
struct listener_key {
	struct address pod;
	__u32 kind;                 /* enum listener_kind */
	__u32 pad;
};
_Static_assert(sizeof(struct listener_key) == 24, "listener_key");

struct cluster_range {
	struct address base;
	__u32 prefix;               /* bits of the 128-bit address: an IPv4 /8 is 104 */
	__u32 pad;
};
_Static_assert(sizeof(struct cluster_range) == 24, "cluster_range");

/* settings: one entry, key 0. Written by the loader (acceleration), then by the agent only. */
struct settings_value {
	__u64 generation;
	__u64 heartbeat_ns;         /* CLOCK_MONOTONIC of the agent's last sign of life */
	__u64 exempt_cgroups[EXEMPT_CGROUPS_MAX];    /* cgroup ids of ztunnel and agent; 0 unused */
	__u64 kubelet_cgroups[KUBELET_CGROUPS_MAX];
	struct cluster_range cluster_ranges[CLUSTER_RANGES_MAX];  /* prefix 0 and base ::: unused */
	__u32 mode;                 /* MODE_* */
	__u32 complete;             /* 1: the maps hold the whole World */
	__u32 cluster_ranges_used;
	__u32 heartbeat_timeout_s;  /* 0: never open on failure */
	__u32 acceleration;         /* CAN_REDIRECT and the others above */
	__u32 high_bytes;           /* above this a receiver is sent native bytes; 0: the programs' own rule */
};
_Static_assert(sizeof(struct settings_value) == 328, "settings_value");

#endif
