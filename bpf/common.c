/* common.c - what several hooks do with the maps. The loader puts all .c files into one text, this first:
 * bcc turns map methods into calls only there, and one text is compiled once and shares its maps. */
#include <uapi/linux/bpf.h>
#include <uapi/linux/in.h>
#include <uapi/linux/in6.h>

#include "layout.h"
#include "decide.h"
#include "compat.h"
#include "redirect.h"
#include "maps.h"

#define REFUSE 0 /* the system call fails with EPERM */
#define LET 1

static __always_inline void count(__u32 reason)
{
	__u64 *value = counters.lookup(&reason);

	if (value)
		*value += 1; /* per CPU, and these programs do not nest */
}

static __always_inline struct settings_value *current_settings(void)
{
	__u32 zero = 0;

	return settings.lookup(&zero);
}

/* Keys of authorized and origins name addresses, and in a namespace of its own anybody may have any address. */
static __always_inline int is_here(__u64 entry_netns, __u64 netns)
{
	return !entry_netns || entry_netns == netns;
}

/* Whether a workload has its share of per-flow entries. Signed: two sockets that close at the same time may take the count
 * below zero, where connections from before the pod's entry was written anew are not in it, and that is nothing used. */
static __always_inline int share_is_used(const struct enrolled_value *pod)
{
	return (__s32)pod->flows >= (__s32)pod->flows_max;
}

/* The same connection seen from its other end. */
static __always_inline struct tuple_key other_end(const struct tuple_key *key)
{
	struct tuple_key out = {};

	out.local = key->remote;
	out.remote = key->local;
	out.local_port = key->remote_port;
	out.remote_port = key->local_port;
	return out;
}

/* A new record under the socket. None, and counted, without room. */
static __always_inline struct pending_value *new_record(struct bpf_sock_addr *ctx)
{
	struct pending_value *record = pending.sk_storage_get(ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);

	if (!record)
		count(REASON_NO_PENDING);
	return record;
}

/* Have sock_ops called when the socket closes. */
static __always_inline void follow_state(struct bpf_sock_ops *ctx)
{
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

/* Whether the calling process is in one of the cgroups or below one. */
static __always_inline int current_in(const __u64 *cgroups, int length)
{
	if (!cgroups[0])
		return 0;
	for (int level = 1; level <= CGROUP_LEVELS_MAX; level++) {
		__u64 id = bpf_get_current_ancestor_cgroup_id(level);

		if (!id)
			return 0;
		for (int index = 0; index < length && cgroups[index]; index++)
			if (cgroups[index] == id)
				return 1;
	}
	return 0;
}

/* Whether the address is the pod's. In its namespace a pod may have any other as well, and what is kept under another's
 * address is another's. */
static __always_inline int is_own_address(struct enrolled_value *pod, const struct address *local)
{
	struct address address = *local;
	struct workload_value *workload = workloads.lookup(&address);

	return workload && workload->workload == pod->workload;
}

/* Whether an unbound socket can be bound to the pod's address of the target's family. */
static __always_inline int has_address(struct enrolled_value *pod, const struct address *target)
{
	return !address_is_any(address_is4(target) ? &pod->address4 : &pod->address6);
}

/* The verdict for a port, or for all ports that have none of their own. */
static __always_inline struct verdict_value *verdict_for(__u32 identity, __u32 workload, __u16 port)
{
	struct verdict_key key = {};
	struct verdict_value *found;

	if (!identity)
		return 0;
	key.identity = identity;
	key.workload = workload;
	key.port = port;
	found = verdicts.lookup(&key);
	if (found)
		return found;
	key.port = 0;
	return verdicts.lookup(&key);
}

/* What it says, and the policy. Read twice: the memory of an entry that was replaced is used again at once, perhaps for the
 * verdict on somebody else, and the first reading may have been of that. */
static __always_inline enum reason verdict_says(__u32 identity, __u32 workload, __u16 port, __u64 generation, __u32 *policy)
{
	struct verdict_value *verdict = verdict_for(identity, workload, port), seen = {};
	enum reason reason;

	if (!verdict)
		return judge(0, generation);
	seen.generation = *(volatile __u64 *)&verdict->generation;
	seen.allow = *(volatile __u32 *)&verdict->allow;
	*policy = seen.policy = *(volatile __u32 *)&verdict->policy;
	reason = judge(&seen, generation);
	if (reason != REASON_KERNEL)
		return reason;
	verdict = verdict_for(identity, workload, port);
	if (!verdict || *(volatile __u64 *)&verdict->generation != seen.generation ||
	    *(volatile __u32 *)&verdict->allow != seen.allow)
		return REASON_STALE_VERDICT;
	return reason;
}

/* The endpoint in a slot, read twice for the same reason: never the address of one with the port of another. */
static __always_inline int endpoint_at(struct endpoint_key *slot, struct endpoint_value *chosen)
{
	struct endpoint_value *found = endpoints.lookup(slot);

	if (!found)
		return 0;
	__builtin_memcpy(chosen, found, sizeof(*chosen));
	found = endpoints.lookup(slot);
	return found && found->workload == chosen->workload && found->port == chosen->port &&
	       address_equal(&found->address4, &chosen->address4) && address_equal(&found->address6, &chosen->address6);
}

/* Of a captured connect: may it go straight to an endpoint of this node instead? REASON_KERNEL if so, with the record
 * filled; REASON_CAPTURED if not, and then ztunnel honours the endpoint if one was chosen. */
static __always_inline enum reason same_node(struct pending_value *record, struct enrolled_value *pod,
					     struct service_value *service, struct settings_value *now,
					     const struct address *bound)
{
	struct address target = record->original;
	__u16 port = record->original_port;
	struct workload_value *found, there = {};
	enum reason reason = REASON_KERNEL;
	__u32 wanted = 0, identity;

	if (service) {
		struct endpoint_key slot = {};
		struct endpoint_value chosen = {};
		struct service_key vip = {};

		if ((service->flags & WORKLOAD_WAYPOINT) || !service->endpoints)
			return REASON_CAPTURED;
		slot.service = *(volatile __u32 *)&service->service;
		slot.port = port;
		slot.slot = bpf_get_prandom_u32() % service->endpoints;
		vip.vip = target;
		vip.port = port;
		service = services.lookup(&vip);
		if (!service || *(volatile __u32 *)&service->service != slot.service)
			return REASON_CAPTURED; /* another's entry has its place: see verdict_says() */
		if (!endpoint_at(&slot, &chosen)) {
			count(REASON_NO_ENDPOINT_SLOT);
			return REASON_CAPTURED;
		}
		target = address_is4(&target) ? chosen.address4 : chosen.address6;
		if (address_is_any(&target))
			return REASON_CAPTURED;
		port = chosen.port;
		wanted = chosen.workload;
		record->endpoint = target;
		record->endpoint_port = port;
	}
	if (address_is_any(bound) ? !has_address(pod, &target) : !is_own_address(pod, bound))
		return REASON_CAPTURED;
	found = workloads.lookup(&target);
	if (!found)
		return REASON_CAPTURED;
	/* The generation first: a verdict that is written for a later one is then void. What is read after it may be of another
	 * entry, because the memory of one that was replaced is used again at once; then this generation is over. */
	there.generation = *(volatile __u64 *)&found->generation;
	there.flags = *(volatile __u32 *)&found->flags;
	there.workload = *(volatile __u32 *)&found->workload;
	if (!is_same_node(&there) || !now->complete || is_guarded_port(port))
		return REASON_CAPTURED;
	if (agent_is_silent(now, bpf_ktime_get_ns()))
		return REASON_CAPTURED;
	if (wanted && there.workload != wanted)
		return REASON_CAPTURED; /* the address has another owner by now */
	record->acceleration = agreed_acceleration(pod->flags, there.flags, now->acceleration);
	if (record->acceleration == ACCELERATION_OFF) {
		count(REASON_ACCELERATION_OFF);
		return REASON_CAPTURED;
	}
	identity = *(volatile __u32 *)&pod->identity;
	record->policy = 0;
	if (!(there.flags & WORKLOAD_ALLOW_ANY))
		reason = verdict_says(identity, there.workload, port, there.generation, &record->policy);
	if (reason != REASON_KERNEL) {
		count(reason);
		return REASON_CAPTURED;
	}
	/* For the same reason: nobody goes under the identity of whose entry took the place of ours meanwhile. */
	pod = enrolled.lookup(&record->netns);
	if (!pod || *(volatile __u32 *)&pod->identity != identity)
		return REASON_CAPTURED;
	record->identity = identity;
	record->workload = there.workload;
	record->generation = there.generation;
	record->remote = target;
	record->remote_port = port;
	return REASON_KERNEL;
}

/* Decide on a connect or datagram of an enrolled pod; fills the record that `pending` will hold. */
static __always_inline enum reason outbound(struct pending_value *record, struct enrolled_value *pod, __u8 stream,
					    const struct address *bound)
{
	struct outbound out = {};
	struct service_key vip = {};
	struct service_value *service;
	struct workload_value *workload;
	struct settings_value *now = current_settings();
	enum reason reason;

	out.target = record->original;
	out.port = record->original_port;
	out.stream = stream;
	out.enrolled_flags = pod->flags;
	out.now_ns = bpf_ktime_get_ns();
	record->source = pod->workload;

	workload = workloads.lookup(&out.target);
	if (workload) {
		out.workload_known = 1;
		out.workload_flags = workload->flags;
		record->workload = workload->workload;
		record->generation = workload->generation;
	}
	vip.vip = out.target;
	vip.port = out.port;
	service = services.lookup(&vip);
	if (service)
		out.service_known = 1;
	if (!now) {
		struct settings_value none = {};

		return decide_outbound(&out, &none);
	}
	out.exempt = current_in(now->exempt_cgroups, EXEMPT_CGROUPS_MAX);
	out.in_cluster = address_in_cluster(&out.target, now);
	reason = decide_outbound(&out, now);
	/* A socket bound to loopback reaches ztunnel there, but no pod. */
	if (reason == REASON_CAPTURED && stream && !address_is_loopback(bound))
		return same_node(record, pod, service, now, bound);
	return reason;
}
