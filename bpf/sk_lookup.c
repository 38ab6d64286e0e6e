/* sk_lookup.c - in each enrolled pod's network namespace: which listener gets a new connection.
 *
 * The helpers allowed here know no namespace, so everything is keyed by the pod's address. The interface says nothing
 * either: a pod's connection to its own address reports the veth. Fails closed: what cannot be assigned is dropped,
 * which for TCP the kernel answers with a reset.
 */

static __always_inline int give(struct bpf_sk_lookup *ctx, const struct address *pod, __u32 kind, __u32 reason)
{
	struct listener_key key = {};
	struct bpf_sock *listener;
	long refused;

	key.pod = *pod;
	key.kind = kind;
	listener = listeners.lookup(&key);
	if (!listener) {
		count(REASON_NO_LISTENER);
		return SK_DROP;
	}
	/* NO_REUSEPORT: an application could have joined a group. */
	refused = bpf_sk_assign(ctx, listener, BPF_SK_LOOKUP_F_NO_REUSEPORT);
	bpf_sk_release(listener);
	if (refused) {
		count(REASON_LISTENER_MISMATCH);
		return SK_DROP;
	}
	count(reason);
	return SK_PASS;
}

int sk_lookup(struct bpf_sk_lookup *ctx)
{
	struct tuple_key key;
	struct authorized_value *entry;
	struct workload_value *local;
	struct settings_value *now;

	if (ctx->protocol != PROTOCOL_TCP)
		return SK_PASS;
	key = lookup_tuple(ctx);
	if (address_is_loopback(&key.local))
		return SK_PASS;
	if (key.local_port == PORT_HBONE)
		return give(ctx, &key.local, LISTENER_HBONE, REASON_HBONE);
	local = workloads.lookup(&key.local);
	entry = authorized.lookup(&key);
	if (entry) {
		struct authorized_value seen = *entry;

		/* Read twice: what was read first may be of another connection, whose entry took the place of this one. */
		if (authorizes(&seen, local)) {
			entry = authorized.lookup(&key);
			if (entry && entry->generation == seen.generation && entry->workload == seen.workload &&
			    entry->reason == seen.reason) {
				count(seen.reason);
				return SK_PASS;
			}
		}
		/* Gone, so that an entry that is still there at PASSIVE_ESTABLISHED has let its connection in. */
		authorized.delete(&key);
		count(REASON_STALE_AUTHORIZED);
	}
	now = current_settings();
	if (now && inbound_bypassed(local, now, bpf_ktime_get_ns())) {
		count(REASON_BYPASS);
		return SK_PASS;
	}
	return give(ctx, &key.local, LISTENER_INBOUND_PLAINTEXT, REASON_STEERED);
}
