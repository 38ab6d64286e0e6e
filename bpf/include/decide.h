/* decide.h - the decisions, on values only: no maps, no contexts, no helpers.
 *
 * Compiled into the eBPF programs and, by gcc, into a library that tests call. What a hook does with a
 * decision is in the hook's own file.
 */
#ifndef AMBIENT_DECIDE_H
#define AMBIENT_DECIDE_H

#include "layout.h"

#ifndef __always_inline
#define __always_inline inline __attribute__((always_inline))
#endif

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
static __always_inline __u16 swap16(__u16 value) { return __builtin_bswap16(value); }
static __always_inline __u32 swap32(__u32 value) { return __builtin_bswap32(value); }
#else
static __always_inline __u16 swap16(__u16 value) { return value; }
static __always_inline __u32 swap32(__u32 value) { return value; }
#endif

/* One of the four words of an address, as it lies in memory (network order). */
static __always_inline __u32 address_word(const struct address *address, int index)
{
	__u32 word;

	__builtin_memcpy(&word, &address->bytes[4 * index], 4);
	return word;
}

static __always_inline struct address address_of6(__u32 a, __u32 b, __u32 c, __u32 d)
{
	struct address out;

	__builtin_memcpy(&out.bytes[0], &a, 4);
	__builtin_memcpy(&out.bytes[4], &b, 4);
	__builtin_memcpy(&out.bytes[8], &c, 4);
	__builtin_memcpy(&out.bytes[12], &d, 4);
	return out;
}

/* ::ffff:a.b.c.d from a word in network order. */
static __always_inline struct address address_of4(__u32 ip4)
{
	return address_of6(0, 0, swap32(0x0000ffff), ip4);
}

static __always_inline int address_equal(const struct address *a, const struct address *b)
{
	return address_word(a, 0) == address_word(b, 0) && address_word(a, 1) == address_word(b, 1) &&
	       address_word(a, 2) == address_word(b, 2) && address_word(a, 3) == address_word(b, 3);
}

static __always_inline int address_is4(const struct address *address)
{
	return !address_word(address, 0) && !address_word(address, 1) &&
	       address_word(address, 2) == swap32(0x0000ffff);
}

/* 0.0.0.0, :: or ::ffff:0.0.0.0: "none". */
static __always_inline int address_is_any(const struct address *address)
{
	return !address_word(address, 0) && !address_word(address, 1) && !address_word(address, 3) &&
	       (!address_word(address, 2) || address_word(address, 2) == swap32(0x0000ffff));
}

/* 127.0.0.0/8 or ::1. */
static __always_inline int address_is_loopback(const struct address *address)
{
	if (address_is4(address))
		return address->bytes[12] == 127;
	return !address_word(address, 0) && !address_word(address, 1) && !address_word(address, 2) &&
	       address_word(address, 3) == swap32(1);
}

/* fe80::/10: means something on one link only, so nobody else can connect there on the pod's behalf. */
static __always_inline int address_is_link_local6(const struct address *address)
{
	return address->bytes[0] == 0xfe && (address->bytes[1] & 0xc0) == 0x80;
}

/* The loopback address of the same family. */
static __always_inline struct address loopback_for(const struct address *address)
{
	if (address_is4(address))
		return address_of4(swap32(0x7f000001));
	return address_of6(0, 0, 0, swap32(1));
}

static __always_inline int address_in_range(const struct address *address, const struct cluster_range *range)
{
	int left = range->prefix;

	for (int index = 0; index < 4; index++) {
		__u32 mask = left >= 32 ? 0xffffffff : left <= 0 ? 0 : ~(0xffffffffu >> left);

		if ((swap32(address_word(address, index)) ^ swap32(address_word(&range->base, index))) & mask)
			return 0;
		left -= 32;
	}
	return 1;
}

static __always_inline int address_in_cluster(const struct address *address, const struct settings_value *settings)
{
	for (int index = 0; index < CLUSTER_RANGES_MAX; index++) {
		if (index >= settings->cluster_ranges_used)
			return 0;
		if (address_in_range(address, &settings->cluster_ranges[index]))
			return 1;
	}
	return 0;
}

/* Connecting to "any" means oneself: the bound address if there is one, else loopback, as the kernel does. */
static __always_inline struct address effective_target(const struct address *target, const struct address *source)
{
	if (!address_is_any(target))
		return *target;
	if (!address_is_any(source))
		return *source;
	return loopback_for(target);
}

static __always_inline int is_guarded_port(__u16 port)
{
	return port == PORT_OUTBOUND || port == PORT_INBOUND_PLAINTEXT || port == PORT_HBONE;
}

/* The agent has not shown itself for longer than the settings allow. */
static __always_inline int heartbeat_stopped(const struct settings_value *settings, __u64 now_ns)
{
	__u64 timeout_ns = (__u64)settings->heartbeat_timeout_s * 1000000000ull;

	return timeout_ns && now_ns > settings->heartbeat_ns && now_ns - settings->heartbeat_ns > timeout_ns;
}

/* Verdicts are as good as the agent that keeps them. */
static __always_inline int agent_is_silent(const struct settings_value *settings, __u64 now_ns)
{
	return now_ns > settings->heartbeat_ns && now_ns - settings->heartbeat_ns > AGENT_SILENT_S * 1000000000ull;
}

/* What is known about a connect or a datagram of an enrolled pod. `settings` is never null: a hook that finds
 * none passes zeroes, and so captures everything. */
struct outbound {
	struct address target;      /* effective */
	__u16 port;
	__u8 stream;                /* TCP */
	__u8 exempt;                /* of ztunnel or the agent */
	__u8 workload_known;
	__u8 service_known;
	__u8 in_cluster;
	__u8 pad;
	__u32 workload_flags;
	__u32 enrolled_flags;
	__u64 now_ns;
};

/* Why and thereby what: REASON_CAPTURED and REASON_NOT_SYNCED capture, REASON_DNS goes to the proxy,
 * REASON_RECURSION is refused, all others are left alone. */
static __always_inline enum reason decide_outbound(const struct outbound *out, const struct settings_value *settings)
{
	int enrolled = out->workload_known && (out->workload_flags & WORKLOAD_ENROLLED);
	int loopback = address_is_loopback(&out->target);

	if (out->exempt)
		return REASON_EXEMPT;
	if (out->stream && is_guarded_port(out->port) && (loopback || enrolled))
		return REASON_RECURSION;
	if (loopback)
		return REASON_LOOPBACK;
	if (settings->mode == MODE_BYPASS || (out->enrolled_flags & ENROLLED_BYPASS))
		return REASON_BYPASS;
	if ((out->enrolled_flags & ENROLLED_OPEN) && heartbeat_stopped(settings, out->now_ns))
		return REASON_BYPASS;
	if (out->port == PORT_DNS_SERVER)
		return REASON_DNS;
	if (!out->stream)
		return REASON_NONE;
	if (out->service_known || enrolled || (out->workload_known && (out->workload_flags & WORKLOAD_WAYPOINT)))
		return REASON_CAPTURED;
	if (address_is_link_local6(&out->target))
		return REASON_NOT_MESH;
	if (!settings->complete)
		return REASON_NOT_SYNCED;
	if (!out->workload_known && out->in_cluster)
		return REASON_CAPTURED;
	return REASON_NOT_MESH;
}

/* The stricter of what both ends of a connection within the node want: ACCELERATION_*. */
static __always_inline __u16 agreed_acceleration(__u32 enrolled_flags, __u32 workload_flags, __u32 capabilities)
{
	if ((enrolled_flags & ENROLLED_OFF) || (workload_flags & WORKLOAD_OFF))
		return ACCELERATION_OFF;
	/* A right that is taken away must end what it let in; and who finds no room in `flows` is let in nowhere. */
	if (capabilities & (NO_DESTROY | CROWDED))
		return ACCELERATION_OFF;
	if (!(enrolled_flags & (ENROLLED_DIRECT | ENROLLED_REDIRECT)) ||
	    !(workload_flags & (WORKLOAD_DIRECT | WORKLOAD_REDIRECT)))
		return ACCELERATION_OFF;
	if ((enrolled_flags & ENROLLED_DIRECT) || (workload_flags & WORKLOAD_DIRECT))
		return ACCELERATION_DIRECT;
	return (capabilities & CAN_REDIRECT) ? ACCELERATION_REDIRECT : ACCELERATION_DIRECT;
}

/* Whether a connection to this workload can be the kernel's to decide at all. */
static __always_inline int is_same_node(const struct workload_value *workload)
{
	__u32 wanted = WORKLOAD_ENROLLED | WORKLOAD_LOCAL;

	return (workload->flags & (wanted | WORKLOAD_WAYPOINT)) == wanted;
}

/* What a verdict says of a connection to a workload that policies select. `verdict` may be null. */
static __always_inline enum reason judge(const struct verdict_value *verdict, __u64 generation)
{
	if (!verdict)
		return REASON_NO_VERDICT;
	if (!generation || verdict->generation != generation)
		return REASON_STALE_VERDICT;
	return verdict->allow ? REASON_KERNEL : REASON_VERDICT_DENIES;
}

/* Whether an authorized entry lets a connection into the workload at the local address. */
static __always_inline int authorizes(const struct authorized_value *entry, const struct workload_value *local)
{
	if (!local || entry->workload != local->workload)
		return 0;
	if (entry->generation && entry->generation != local->generation)
		return 0;
	if (entry->reason == REASON_KERNEL)
		return entry->generation != 0;
	return entry->reason == REASON_PROBE || entry->reason == REASON_ZTUNNEL;
}

/* Whether plaintext to a local pod is left alone instead of being steered to the capture listener. */
static __always_inline int inbound_bypassed(const struct workload_value *local, const struct settings_value *settings,
					    __u64 now_ns)
{
	if (settings->mode == MODE_BYPASS)
		return 1;
	if (!local)
		return 0;
	if (local->flags & WORKLOAD_BYPASS)
		return 1;
	return (local->flags & WORKLOAD_OPEN) && heartbeat_stopped(settings, now_ns);
}

#define REDIRECT_NATIVE_EVERY_NS 3000000000ull

/* What is known of a message and of the two sockets it goes between. */
struct redirection {
	__u64 now_ns;
	__u64 last_native_ns;
	__u32 size;             /* of the message */
	__u32 state;            /* FLOW_NATIVE or FLOW_REDIRECT */
	__u32 queued_messages;  /* redirected since the receiver held nothing */
	__u32 rmem;             /* bytes the receiver holds, native and redirected */
	__u32 high;
	__s32 forward;          /* bytes already set aside for the receiver */
	__u8 native_gone;       /* native_is_gone(); of FLOW_REDIRECT: no native byte was written since it was */
	__u8 receiver_ready;    /* its descriptor exists and is O_NONBLOCK */
	__u8 pressed;           /* memory might be refused */
	__u8 edge;              /* somebody may take a short read of the receiver for more than it says */
	__u8 pad[4];
};

/* What a receiver may hold before it is sent native bytes, which TCP holds back. */
static __always_inline __u32 redirect_high(__u32 wanted, __u32 rcvbuf)
{
	__u32 high = wanted ? wanted : REDIRECT_HIGH_BYTES;

	return high < 2 * rcvbuf ? high : 2 * rcvbuf;
}

static __always_inline int redirect_full(const struct redirection *seen)
{
	return seen->rmem > seen->high || seen->queued_messages >= REDIRECT_MESSAGES;
}

/* How far TCP is with what one end sends: counts of bytes, modulo 2^32. */
struct progress {
	__u32 written;          /* the sender's write_seq */
	__u32 acknowledged;     /* the sender's snd_una */
	__u32 arrived;          /* the receiver's rcv_nxt */
	__u32 consumed;         /* the receiver's copied_seq */
	__u32 seen;             /* the same when the receiver was inserted, or the direction last turned to redirection */
	__u8 reading;           /* somebody has the receiver's lock in a system call */
	__u8 numbered;          /* END_NUMBERED */
	__u8 pad[2];
};

/* What was written is all acknowledged, arrived, and consumed: all by the same number, unless somebody between the ends
 * changes the numbers. */
static __always_inline int is_numbered(const struct progress *tcp)
{
	return tcp->acknowledged == tcp->written && tcp->arrived == tcp->written && tcp->consumed == tcp->written;
}

/* Whether no native byte of this direction is unread anywhere. The acknowledgements may be late. */
static __always_inline int native_is_gone(const struct progress *tcp)
{
	return (tcp->numbered || is_numbered(tcp)) && tcp->consumed == tcp->written && tcp->consumed != tcp->seen && !tcp->reading;
}

/* Whether a message may be redirected; else it goes natively. */
static __always_inline int decide_redirect(const struct redirection *seen)
{
	if (!seen->receiver_ready || seen->pressed || redirect_full(seen))
		return 0;
	/* Whoever waits for edges must never find native bytes behind redirected ones. If it turned to edges only now,
	 * what was redirected is read first. */
	if (seen->edge && !(seen->state == FLOW_REDIRECT && seen->rmem))
		return 0;
	/* A native message at times shows the path's own filters that the connection lives, and obeys them. Rather
	 * when nothing is unread, so that the reader finds it in the same turn. */
	if (seen->now_ns - seen->last_native_ns > (seen->rmem ? 2ull : 1ull) * REDIRECT_NATIVE_EVERY_NS)
		return 0;
	return seen->native_gone;
}

#endif
