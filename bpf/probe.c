/* probe.c - cgroup/connect4 and connect6 at the node's root: marks the kubelet's sockets that go to an enrolled pod.
 *
 * A probe is known by the process that makes it and never by its address: kube-proxy masquerades strangers to the
 * node's address. sock_ops then authorizes the exact 4-tuple. Never refuses.
 */

static __always_inline void mark_probe(struct bpf_sock_addr *ctx, const struct address *target)
{
	struct settings_value *now;
	struct pending_value *kept = pending.sk_storage_get(ctx->sk, 0, 0);
	struct workload_value *workload;
	struct address pod = *target;

	/* What connect.c recorded for a pod's socket is not ours; what we recorded earlier ends with this connect. */
	if (kept && kept->reason != REASON_PROBE)
		return;
	if (kept)
		pending.sk_storage_delete(ctx->sk);
	now = current_settings();
	if (ctx->protocol != PROTOCOL_TCP || !now || !current_in(now->kubelet_cgroups, KUBELET_CGROUPS_MAX))
		return;
	workload = workloads.lookup(&pod);
	if (!workload || !(workload->flags & WORKLOAD_LOCAL) || !(workload->flags & WORKLOAD_ENROLLED))
		return;
	kept = new_record(ctx);
	if (!kept)
		return;
	kept->original = pod;
	kept->remote = pod;
	kept->original_port = sockaddr_port(ctx);
	kept->remote_port = kept->original_port;
	kept->workload = workload->workload;
	kept->generation = workload->generation;
	kept->reason = REASON_PROBE;
}

int probe4(struct bpf_sock_addr *ctx)
{
	struct address target = sockaddr_target4(ctx);

	mark_probe(ctx, &target);
	return LET;
}

int probe6(struct bpf_sock_addr *ctx)
{
	struct address target = sockaddr_target6(ctx);

	mark_probe(ctx, &target);
	return LET;
}
