/* connect.c - cgroup/connect4 and connect6 at the pods' cgroup: leave alone, authorize within the node,
 * capture, send DNS to the proxy, refuse.
 *
 * Fails closed: without room for the socket's record, without the pod's own address or beyond the pod's share the
 * connect fails with EPERM. The two programs are twins; what differs is the family of sockaddr.
 */

/* Whether a record is kept and the socket sent where it says. */
static __always_inline int turned(enum reason reason)
{
	return reason == REASON_CAPTURED || reason == REASON_NOT_SYNCED || reason == REASON_DNS || reason == REASON_KERNEL;
}

/* Everything before the address is bound and rewritten. Returns REASON_NONE for what is none of ours. */
static __always_inline enum reason plan_connect(struct bpf_sock_addr *ctx, struct pending_value *record,
						struct enrolled_value **pod)
{
	struct address source;
	struct address target = record->original;
	__u8 stream = ctx->protocol == PROTOCOL_TCP;
	enum reason reason;

	if (!stream && ctx->protocol != PROTOCOL_UDP)
		return REASON_NONE;
	record->netns = bpf_get_netns_cookie(ctx);
	*pod = enrolled.lookup(&record->netns);
	if (!*pod)
		return REASON_NONE;
	source = sock_source(sockaddr_sock(ctx));
	record->original = effective_target(&target, &source);
	record->original_port = sockaddr_port(ctx);
	reason = outbound(record, *pod, stream, &source);
	if (!turned(reason))
		return reason;
	if (stream && reason != REASON_DNS && share_is_used(*pod)) {
		__sync_fetch_and_add(&(*pod)->refused, 1);
		return REASON_SHARE_EXCEEDED;
	}
	record->reason = reason;
	if (reason == REASON_KERNEL)
		return reason;
	record->remote = loopback_for(&record->original);
	record->remote_port = reason == REASON_DNS ? PORT_DNS : PORT_OUTBOUND;
	return reason;
}

static __always_inline int not_turned(enum reason reason)
{
	if (reason != REASON_NONE)
		count(reason);
	return reason == REASON_RECURSION || reason == REASON_SHARE_EXCEEDED ? REFUSE : LET;
}

/* Only a stream socket nobody bound: a bound one keeps its address, and the kernel binds only once. The pod's address
 * is then what getsockname shows, what reaches ztunnel's listener on loopback, and, on the way to another pod, the one
 * that is authorized: routes of the pod's own do not choose another. */
static __always_inline int wants_bind(struct bpf_sock_addr *ctx, const struct address *address)
{
	return ctx->protocol == PROTOCOL_TCP && !address_is_any(address) && !sock_source_port(sockaddr_sock(ctx));
}

int connect4(struct bpf_sock_addr *ctx)
{
	struct pending_value record = {};
	struct pending_value *kept;
	struct enrolled_value *pod = 0;
	struct sockaddr_in local = {};
	enum reason reason;

	pending.sk_storage_delete(ctx->sk);
	record.original = sockaddr_target4(ctx);
	reason = plan_connect(ctx, &record, &pod);
	if (!turned(reason) || !pod)
		return not_turned(reason);
	if (wants_bind(ctx, &pod->address4)) {
		local.sin_family = FAMILY_INET;
		local.sin_addr.s_addr = address_word(&pod->address4, 3);
		if (bpf_bind(ctx, (struct sockaddr *)&local, sizeof(local))) {
			count(REASON_BIND_FAILED);
			return REFUSE;
		}
	}
	kept = new_record(ctx);
	if (!kept)
		return REFUSE;
	*kept = record;
	sockaddr_set4(ctx, &record.remote, record.remote_port);
	count(reason);
	return LET;
}

int connect6(struct bpf_sock_addr *ctx)
{
	struct pending_value record = {};
	struct pending_value *kept;
	struct enrolled_value *pod = 0;
	struct sockaddr_in6 local = {};
	struct address own;
	enum reason reason;

	pending.sk_storage_delete(ctx->sk);
	record.original = sockaddr_target6(ctx);
	reason = plan_connect(ctx, &record, &pod);
	if (!turned(reason) || !pod)
		return not_turned(reason);
	/* ::ffff:a.b.c.d on an IPv6 socket is IPv4: bound and sent on as such, in its mapped form. */
	own = address_is4(&record.original) ? pod->address4 : pod->address6;
	if (wants_bind(ctx, &own)) {
		local.sin6_family = FAMILY_INET6;
		__builtin_memcpy(&local.sin6_addr, &own, sizeof(own));
		if (bpf_bind(ctx, (struct sockaddr *)&local, sizeof(local))) {
			count(REASON_BIND_FAILED);
			return REFUSE;
		}
	}
	kept = new_record(ctx);
	if (!kept)
		return REFUSE;
	*kept = record;
	sockaddr_set6(ctx, &record.remote, record.remote_port);
	count(reason);
	return LET;
}
