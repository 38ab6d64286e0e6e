/* dns.c - cgroup/sendmsg4,6 and recvmsg4,6 at the pods' cgroup: datagrams to port 53 go to the DNS proxy, and its answers
 * seem to come from the server that was asked. Connected sockets are turned by connect.c; their answers pass here too.
 *
 * A socket that asks several servers at once sees all answers come from the one it asked last: resolvers accept an
 * answer from any of their servers. Fails closed: without room for the record, EPERM.
 */

static __always_inline enum reason plan_datagram(struct bpf_sock_addr *ctx, struct pending_value *record)
{
	struct enrolled_value *pod;
	struct address source;
	struct address target = record->original;
	enum reason reason;

	record->original_port = sockaddr_port(ctx);
	if (record->original_port != PORT_DNS_SERVER || ctx->protocol != PROTOCOL_UDP)
		return REASON_NONE;
	record->netns = bpf_get_netns_cookie(ctx);
	pod = enrolled.lookup(&record->netns);
	if (!pod)
		return REASON_NONE;
	source = sock_source(sockaddr_sock(ctx));
	record->original = effective_target(&target, &source);
	reason = outbound(record, pod, 0, &source);
	record->remote = loopback_for(&record->original);
	record->remote_port = PORT_DNS;
	record->reason = reason;
	return reason;
}

int sendmsg4(struct bpf_sock_addr *ctx)
{
	struct pending_value record = {};
	struct pending_value *kept;

	record.original = sockaddr_target4(ctx);
	if (plan_datagram(ctx, &record) != REASON_DNS)
		return LET;
	kept = new_record(ctx);
	if (!kept)
		return REFUSE;
	*kept = record;
	sockaddr_set4(ctx, &record.remote, record.remote_port);
	count(REASON_DNS);
	return LET;
}

int sendmsg6(struct bpf_sock_addr *ctx)
{
	struct pending_value record = {};
	struct pending_value *kept;

	record.original = sockaddr_target6(ctx);
	if (plan_datagram(ctx, &record) != REASON_DNS)
		return LET;
	kept = new_record(ctx);
	if (!kept)
		return REFUSE;
	*kept = record;
	sockaddr_set6(ctx, &record.remote, record.remote_port);
	count(REASON_DNS);
	return LET;
}

static __always_inline struct pending_value *asked(struct bpf_sock_addr *ctx, const struct address *from)
{
	struct pending_value *kept = pending.sk_storage_get(ctx->sk, 0, 0);

	if (!kept || kept->reason != REASON_DNS || kept->remote_port != sockaddr_port(ctx))
		return 0;
	return address_equal(&kept->remote, from) ? kept : 0;
}

int recvmsg4(struct bpf_sock_addr *ctx)
{
	struct address from = sockaddr_target4(ctx);
	struct pending_value *kept = asked(ctx, &from);

	if (kept)
		sockaddr_set4(ctx, &kept->original, kept->original_port);
	return LET;
}

int recvmsg6(struct bpf_sock_addr *ctx)
{
	struct address from = sockaddr_target6(ctx);
	struct pending_value *kept = asked(ctx, &from);

	if (kept)
		sockaddr_set6(ctx, &kept->original, kept->original_port);
	return LET;
}
