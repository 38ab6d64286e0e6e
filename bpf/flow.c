/* flow.c - the life of a connection within the node: its entry in flows, beside what lets it in, written at its client's
 * TCP_CONNECT_CB, what each end has moved, and its one report when both are closed. sockops.c calls it.
 */

/* Both ends of a flow are closed: tell telemetry. Whoever deletes the entry has reported it, so it is reported once;
 * without room in the ring buffer it stays for the reader to take. */
static __always_inline void report(struct tuple_key *key, struct flow_value *flow)
{
	struct flow_event *event = events.ringbuf_reserve(sizeof(struct flow_event));

	if (!event) {
		__sync_fetch_and_add(&flow->flags, FLOW_UNREPORTED);
		count(REASON_FLOW_UNREPORTED);
		return;
	}
	event->key = *key;
	event->value = *flow;
	event->closed_ns = bpf_ktime_get_ns();
	if (flows.delete(key))
		events.ringbuf_discard(event, 0);
	else
		events.ringbuf_submit(event, 0);
}

/* The 4-tuple is used again while the server's socket of its last use is still open: that flow is over for its client.
 * Where the ring buffer is full it is filed aside, under a key that no connection has. Non-zero: the flow is another
 * socket's that lives, which a socket bound to another device can have the 4-tuple of; it must stay where the agent
 * finds it. */
static __always_inline int supersede(struct tuple_key *key)
{
	struct flow_value *old = flows.lookup(key);
	struct tuple_key aside = *key;

	if (!old)
		return 0;
	if (!(*(volatile __u32 *)&old->client.flags & END_CLOSED))
		return 1;
	__builtin_memset(&old->server.cookie, 0, sizeof(old->server.cookie));
	report(key, old);
	old = flows.lookup(key);
	if (!old)
		return 0;
	aside.pad = (__u32)old->created_ns | 1;
	flows.update(&aside, old);
	flows.delete(key);
	return 0;
}

/* A connection within the node: first the flow, then what lets it in, so that there is none that nobody accounts for. */
static __always_inline void write_flow(struct bpf_sock_ops *ctx, struct bpf_sock *sk, struct pending_value *kept,
				       const struct tuple_key *own)
{
	struct tuple_key key = other_end(own);
	struct enrolled_value *pod = enrolled.lookup(&kept->netns);
	struct authorized_value value = {};

	if (!pod)
		return; /* un-enrolled since connect: steered */
	if (!is_own_address(pod, &own->local)) {
		count(REASON_FOREIGN_SOURCE);
		return;
	}
	if (share_is_used(pod)) {
		__sync_fetch_and_add(&pod->refused, 1);
		count(REASON_SHARE_EXCEEDED);
		return;
	}
	if (supersede(&key)) {
		count(REASON_TUPLE_TAKEN);
		return;
	}
	{
		struct flow_value flow = {};

		flow.client.sock = (__u64)(unsigned long)sk;
		flow.client.cookie = bpf_get_socket_cookie(ctx);
		flow.created_ns = bpf_ktime_get_ns();
		flow.generation = kept->generation;
		flow.netns_client = kept->netns;
		flow.original = kept->original;
		flow.original_port = kept->original_port;
		flow.source = kept->source;
		flow.destination = kept->workload;
		flow.identity = kept->identity;
		flow.policy = kept->policy;
		flow.reason = REASON_KERNEL;
		flow.acceleration = kept->acceleration;
		value.created_ns = flow.created_ns;
		if (flows.update(&key, &flow)) {
			count(REASON_FLOWS_FULL);
			return;
		}
	}
	value.generation = kept->generation;
	value.workload = kept->workload;
	value.reason = REASON_KERNEL;
	if (authorized.update(&key, &value)) {
		flows.delete(&key);
		count(REASON_AUTHORIZED_FULL);
		return;
	}
	__sync_fetch_and_add(&pod->flows, 1);
	kept->client = own->local;
	kept->client_port = own->local_port;
	kept->state = PENDING_FLOW;
	follow_state(ctx);
}

/* Bytes the application sent and read through TCP. TCP counts SYN and FIN as a byte each; which of them it has counted
 * is told by the state the socket comes from. */
static __always_inline __u64 sent_bytes(struct bpf_sock_ops *ctx, int active)
{
	__u64 bytes = ctx->bytes_acked;
	__u32 from = ctx->args[0];
	__u64 extra = active ? 1 : 0;

	if (from == STATE_FIN_WAIT2 || from == STATE_LAST_ACK || from == STATE_CLOSING || from == STATE_TIME_WAIT)
		extra++;
	return bytes > extra ? bytes - extra : 0;
}

static __always_inline __u64 received_bytes(struct bpf_sock_ops *ctx)
{
	__u64 bytes = ctx->bytes_received;
	__u32 from = ctx->args[0];

	if (from == STATE_FIN_WAIT2 || from == STATE_CLOSE_WAIT || from == STATE_LAST_ACK || from == STATE_CLOSING ||
	    from == STATE_TIME_WAIT)
		return bytes ? bytes - 1 : 0;
	return bytes;
}

/* One end closed. What it sent it knows best; what it read stands for the other end until that one closes. */
static __always_inline void close_end(struct bpf_sock_ops *ctx, struct tuple_key *key, struct flow_value *flow,
				      struct flow_end *own, struct flow_end *other, int active)
{
	__u64 sent = sent_bytes(ctx, active);
	__u64 received = received_bytes(ctx);

	if (sent > own->native_bytes)
		own->native_bytes = sent;
	if (received > other->native_bytes)
		other->native_bytes = received;
	/* Atomic for its barrier: of two ends that close at once at least one sees the other closed. */
	__sync_fetch_and_add(&own->flags, END_CLOSED);
	if (!other->cookie || (*(volatile __u32 *)&other->flags & END_CLOSED))
		report(key, flow);
}
