/* sockops.c - sock_ops at the node's cgroup: gives a connection its entries when its port is known, hands the redirect
 * record to the socket ztunnel accepts, and removes every entry at the close of the socket it belongs to. What is counted
 * of connections within the node is in flow.c.
 *
 * It cannot refuse anything: what it does not write, ztunnel closes or sk_lookup steers.
 */

#define LEVEL_TCP 6
#define OPTION_CONGESTION 13
#define NAME_BBR 0x726262ULL    /* "bbr", whatever follows */
#define NAME_RENO 0x6f6e6572ULL /* "reno" */

/* Between an application and ztunnel there is no network to spare. Where the node's congestion control paces, the kernel
 * would start a timer for every few segments, and take a busy CPU for a slow path. Before the SYN leaves, or before
 * the accepted socket begins: pacing that has begun does not end. */
static __always_inline void unpace(struct bpf_sock_ops *ctx)
{
	__u64 name = 0;

	if (bpf_getsockopt(ctx, LEVEL_TCP, OPTION_CONGESTION, &name, sizeof(name)) || (name & 0xffffff) != NAME_BBR)
		return;
	name = NAME_RENO;
	bpf_setsockopt(ctx, LEVEL_TCP, OPTION_CONGESTION, &name, 5);
}

static __always_inline void write_redirect(struct bpf_sock_ops *ctx, struct pending_value *kept, const struct tuple_key *own)
{
	struct redirect_key key = {};
	struct redirect_value value = {};
	struct enrolled_value *pod = enrolled.lookup(&kept->netns);

	if (!pod)
		return; /* un-enrolled since connect: ztunnel closes what it has no record of */
	/* A deferred fast open may get here long after it was admitted. */
	if (share_is_used(pod)) {
		__sync_fetch_and_add(&pod->refused, 1);
		count(REASON_SHARE_EXCEEDED);
		return;
	}
	key.netns = kept->netns;
	key.client = own->local;
	key.client_port = own->local_port;
	key.listener_port = own->remote_port;
	value.original = kept->original;
	value.original_port = kept->original_port;
	value.endpoint = kept->endpoint;
	value.endpoint_port = kept->endpoint_port;
	value.client = own->local;
	value.client_port = own->local_port;
	value.netns = kept->netns;
	value.source = kept->source;
	value.created_ns = bpf_ktime_get_ns();
	if (redirects.update(&key, &value)) {
		count(REASON_REDIRECTS_FULL);
		return;
	}
	__sync_fetch_and_add(&pod->flows, 1);
	kept->client = own->local;
	kept->client_port = own->local_port;
	kept->state = PENDING_COUNTED;
	follow_state(ctx);
	unpace(ctx);
}

static __always_inline void write_authorized(struct bpf_sock_ops *ctx, struct pending_value *kept, const struct tuple_key *own)
{
	struct tuple_key key = other_end(own);
	struct authorized_value value = {};

	value.generation = kept->generation;
	value.workload = kept->workload;
	value.reason = REASON_PROBE;
	value.created_ns = bpf_ktime_get_ns();
	if (authorized.update(&key, &value)) {
		count(REASON_AUTHORIZED_FULL);
		return;
	}
	kept->client = own->local;
	kept->client_port = own->local_port;
	kept->state = PENDING_AUTHORIZED;
	follow_state(ctx);
}

/* TCP_CONNECT_CB: the source port exists, the SYN has not left. */
static __always_inline void connecting(struct bpf_sock_ops *ctx, struct bpf_sock *sk, const struct tuple_key *own)
{
	struct tuple_key theirs = other_end(own);
	struct pending_value *kept = pending.sk_storage_get(sk, 0, 0);

	if (!kept) {
		struct authorized_value *entry = authorized.lookup(&theirs);

		/* ztunnel's own delivery: its entries go with the socket, also when ztunnel is killed. */
		if (entry && entry->reason == REASON_ZTUNNEL && is_here(entry->netns, bpf_get_netns_cookie(ctx)))
			follow_state(ctx);
		return;
	}
	if (kept->remote_port != own->remote_port || !address_equal(&kept->remote, &own->remote)) {
		count(REASON_TUPLE_MISMATCH);
		return;
	}
	if (kept->reason == REASON_CAPTURED || kept->reason == REASON_NOT_SYNCED)
		write_redirect(ctx, kept, own);
	else if (kept->reason == REASON_PROBE)
		write_authorized(ctx, kept, own);
	else if (kept->reason == REASON_KERNEL)
		write_flow(ctx, sk, kept, own);
}

/* Whether this namespace is that of the workload an entry of the kernel path lets a connection into. Addresses do not tell:
 * in a namespace of its own anybody may have any. */
static __always_inline int is_destination(const struct authorized_value *entry, __u64 netns)
{
	struct enrolled_value *pod = enrolled.lookup(&netns);

	return pod && pod->workload == entry->workload;
}

/* PASSIVE_ESTABLISHED: before accept() can return the socket. */
static __always_inline void accepting(struct bpf_sock_ops *ctx, struct bpf_sock *sk, const struct tuple_key *own)
{
	struct authorized_value *entry;
	struct origin_value *origin;
	__u64 netns = bpf_get_netns_cookie(ctx);

	if (own->local_port == PORT_OUTBOUND && address_is_loopback(&own->local)) {
		struct redirect_key key = {};
		struct redirect_value value;
		struct redirect_value *found;

		key.netns = netns;
		key.client = own->remote;
		key.client_port = own->remote_port;
		key.listener_port = own->local_port;
		found = redirects.lookup(&key);
		if (!found)
			return;
		value = *found;
		redirects.delete(&key);
		__builtin_memset(&key, 0, sizeof(key));
		key.cookie = bpf_get_socket_cookie(ctx);
		if (redirects.update(&key, &value)) {
			count(REASON_REDIRECTS_FULL);
			return;
		}
		follow_state(ctx);
		return;
	}
	entry = authorized.lookup((struct tuple_key *)own);
	if (entry && entry->reason == REASON_KERNEL && is_destination(entry, netns)) {
		struct flow_value *flow = flows.lookup((struct tuple_key *)own);

		if (flow) {
			flow->server.sock = (__u64)(unsigned long)sk;
			flow->server.cookie = bpf_get_socket_cookie(ctx);
			flow->netns_server = netns;
			follow_state(ctx);
		}
		authorized.delete((struct tuple_key *)own);
	} else if (entry && (entry->reason == REASON_ZTUNNEL ? is_here(entry->netns, netns) : is_destination(entry, netns))) {
		if (entry->reason == REASON_ZTUNNEL)
			unpace(ctx);
		authorized.delete((struct tuple_key *)own);
	}
	origin = origins.lookup((struct tuple_key *)own);
	if (origin && is_here(origin->netns, netns)) {
		origin->accepted = bpf_get_socket_cookie(ctx);
		follow_state(ctx);
	}
}

/* The key of the entries of a connection that is recorded under the socket of its client: as the server sees it. */
static __always_inline struct tuple_key recorded_tuple(const struct pending_value *kept)
{
	struct tuple_key key = {};

	key.local = kept->remote;
	key.local_port = kept->remote_port;
	key.remote = kept->client;
	key.remote_port = kept->client_port;
	return key;
}

static __always_inline void give_share_back(const struct pending_value *kept)
{
	__u64 netns = kept->netns;
	struct enrolled_value *pod = enrolled.lookup(&netns);

	if (pod && (__s32)pod->flows > 0)
		__sync_fetch_and_add(&pod->flows, -1);
}

static __always_inline void closing(struct bpf_sock_ops *ctx, struct bpf_sock *sk, struct tuple_key *own)
{
	struct tuple_key theirs = other_end(own);
	struct pending_value *kept = pending.sk_storage_get(sk, 0, 0);
	struct authorized_value *entry;
	struct origin_value *origin;
	__u64 cookie = bpf_get_socket_cookie(ctx);
	__u64 netns = bpf_get_netns_cookie(ctx);

	if (kept && kept->state == PENDING_COUNTED) {
		struct redirect_key key = {};

		give_share_back(kept);
		key.netns = kept->netns;
		key.client = kept->client;
		key.client_port = kept->client_port;
		key.listener_port = kept->remote_port;
		redirects.delete(&key);
		kept->state = PENDING_DECIDED;
		return;
	}
	if (kept && kept->state == PENDING_AUTHORIZED) {
		theirs = recorded_tuple(kept);
		authorized.delete(&theirs);
		kept->state = PENDING_DECIDED;
		return;
	}
	if (kept && kept->state == PENDING_FLOW) {
		struct flow_value *flow;

		give_share_back(kept);
		theirs = recorded_tuple(kept);
		kept->state = PENDING_DECIDED;
		flow = flows.lookup(&theirs);
		if (flow && flow->client.cookie != cookie)
			flow = 0;
		/* Where there is a server's socket, its PASSIVE_ESTABLISHED has used the entry up. */
		if (!flow || !flow->server.cookie)
			authorized.delete(&theirs);
		if (flow)
			close_end(ctx, &theirs, flow, &flow->client, &flow->server, 1);
		return;
	}
	if (own->local_port == PORT_OUTBOUND) {
		struct redirect_key key = {};

		key.cookie = cookie;
		redirects.delete(&key);
		return;
	}
	{
		struct flow_value *flow = flows.lookup(own);

		if (flow && flow->server.cookie == cookie) {
			close_end(ctx, own, flow, &flow->server, &flow->client, 0);
			return;
		}
		/* The client's end of a flow that an earlier layout let in: nothing is kept under its socket. */
		flow = flows.lookup(&theirs);
		if (flow && flow->client.cookie == cookie) {
			close_end(ctx, &theirs, flow, &flow->client, &flow->server, 1);
			return;
		}
	}
	/* The application's end of a delivered connection. The cookie tells it from a later one with the same ports. */
	origin = origins.lookup(own);
	if (origin && origin->accepted == cookie)
		origins.delete(own);
	/* ztunnel's end: if the application never had one, nothing else will remove the entries. */
	entry = authorized.lookup(&theirs);
	if (entry && entry->reason == REASON_ZTUNNEL && is_here(entry->netns, netns))
		authorized.delete(&theirs);
	origin = origins.lookup(&theirs);
	if (origin && !origin->accepted && is_here(origin->netns, netns))
		origins.delete(&theirs);
}

int sock_ops(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = sockops_sock(ctx);
	struct tuple_key own;
	__u32 op = ctx->op;

	if (op != BPF_SOCK_OPS_TCP_CONNECT_CB && op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB &&
	    !(op == BPF_SOCK_OPS_STATE_CB && ctx->args[1] == STATE_CLOSE))
		return 1;
	if (!sk)
		return 1; /* a request, not yet a socket: never at these three */
	own = sockops_tuple(ctx);
	if (op == BPF_SOCK_OPS_TCP_CONNECT_CB)
		connecting(ctx, sk, &own);
	else if (op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		accepting(ctx, sk, &own);
	else
		closing(ctx, sk, &own);
	return 1;
}
